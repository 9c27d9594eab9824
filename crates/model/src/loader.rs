//! From a base on the disk to layers that compute.

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use pronk_kernels::{FrozenLinear, FrozenMatrix, Precision, computes_on_host};
use pronk_lora::LoraLinear;

use crate::config::block_prefix;
use crate::mapped::Pages;
use crate::{Base, Block, ModelError};

/// How a decoder holds its weights and multiplies with them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadConfig {
    /// What factors of products are rounded to, on the host's processor.
    pub precision: Precision,
    /// Whether all blocks stay in memory.
    pub weights: Residency,
}

impl Default for LoadConfig {
    fn default() -> Self {
        Self { precision: Precision::F32, weights: Residency::Resident }
    }
}

/// Where the weights of the blocks are while other blocks compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Residency {
    /// In memory: the device's own, or mapped from the base's files.
    Resident,
    /// On the disk. A block is in memory while it computes, and the next one is on its way.
    Streamed,
}

/// Reads layers of a base, counting tensors.
pub(crate) struct Loader<'a> {
    pub base: &'a Base,
    pub device: &'a Device,
    pub config: LoadConfig,
    pub done: usize,
    pub progress: &'a mut dyn FnMut(usize),
}

impl Loader<'_> {
    pub fn matrix(&mut self, name: &str) -> Result<Arc<FrozenMatrix>, ModelError> {
        let matrix = self.base.matrix(name)?;
        self.count();
        Ok(Arc::new(matrix))
    }

    pub fn vector(&mut self, name: &str) -> Result<Tensor<1>, ModelError> {
        let host = self.base.read(name)?;
        let tensor = Tensor::from_data(TensorData::new(host.to_f32(), host.shape), self.device);
        self.count();
        Ok(tensor)
    }

    /// A layer where it will compute: products with host matrices run on the host, so another
    /// device gets its own copy, unless blocks are sent there one at a time.
    pub fn linear(&self, weight: Arc<FrozenMatrix>, bias: Option<Tensor<1>>) -> FrozenLinear {
        let linear = FrozenLinear::on_host(weight, self.config.precision, bias);
        if computes_on_host(self.device) { linear } else { linear.on_device(self.device) }
    }

    pub fn block(&mut self, layer: usize) -> Result<Block, ModelError> {
        let config = &self.base.config;
        let prefix = block_prefix(layer);
        let (attention, mlp) = (config.attention_bias, config.mlp_bias);
        let mut linear = |name: &str, bias| self.lora_linear(format!("{prefix}{name}"), bias);
        Ok(Block {
            q_proj: linear("self_attn.q_proj", attention)?,
            k_proj: linear("self_attn.k_proj", attention)?,
            v_proj: linear("self_attn.v_proj", attention)?,
            o_proj: linear("self_attn.o_proj", attention)?,
            gate_proj: linear("mlp.gate_proj", mlp)?,
            up_proj: linear("mlp.up_proj", mlp)?,
            down_proj: linear("mlp.down_proj", mlp)?,
            input_layernorm: self.vector(&format!("{prefix}input_layernorm.weight"))?,
            post_attention_layernorm: self.vector(&format!("{prefix}post_attention_layernorm.weight"))?,
            head_dim: config.head_dim,
            rms_norm_eps: config.rms_norm_eps,
        })
    }

    fn lora_linear(&mut self, name: String, bias: bool) -> Result<LoraLinear, ModelError> {
        let weight = self.matrix(&format!("{name}.weight"))?;
        let bias = if bias { Some(self.vector(&format!("{name}.bias"))?) } else { None };
        let linear = match self.config.weights {
            Residency::Resident => self.linear(weight, bias),
            Residency::Streamed => FrozenLinear::on_host(weight, self.config.precision, bias),
        };
        Ok(LoraLinear::new(name, linear))
    }

    /// Where the tensors of a block lie in the base's files.
    pub fn pages(&self, layer: usize) -> Vec<Pages> {
        let prefix = block_prefix(layer);
        let names = self.base.config.tensors().into_iter().map(|(name, _)| name);
        names.filter(|name| name.starts_with(&prefix)).filter_map(|name| self.base.pages(&name)).collect()
    }

    fn count(&mut self) {
        self.done += 1;
        (self.progress)(self.done);
    }
}
