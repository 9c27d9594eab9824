//! From a base on the disk to layers that compute.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use pronk_kernels::{Format, FrozenLinear, FrozenMatrix, Precision, computes_on_host};
use pronk_lora::LoraLinear;

use crate::config::block_prefix;
use crate::decoder::Streamed;
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

impl LoadConfig {
    /// Whether wider floats become bf16 once, at load, rather than at every product.
    fn rounds_at_load(self) -> bool {
        self.weights == Residency::Resident
            && self.precision == Precision::Bf16
            && Precision::fastest() == Precision::Bf16
    }
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

/// Bytes of a base's weights while it computes on the host's processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightBytes {
    /// Of those that are there all the time: everything, or where blocks are streamed the largest block.
    pub resident: u64,
    /// Of the output projection, where it comes and goes between the blocks.
    pub streamed_head: u64,
}

impl WeightBytes {
    /// As `base` keeps them, or with the linear layers of its blocks in `format`. Nothing is read
    /// beyond headers.
    pub fn of(base: &Base, config: LoadConfig, format: Option<Format>) -> Result<Self, ModelError> {
        let (mut blocks, mut rest) = (vec![0; base.config.num_hidden_layers], 0);
        let head =
            if base.config.tie_word_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" };
        for (name, shape) in base.config.tensors() {
            let block = (0..blocks.len()).find(|&layer| name.starts_with(&block_prefix(layer)));
            let bytes = match (&shape[..], format.filter(|_| block.is_some())) {
                (&[rows, cols], Some(format)) => format.bytes_for(rows, cols) as u64,
                (&[rows, cols], None) => {
                    let matrix = base.matrix(&name)?;
                    let rounded = config.rounds_at_load() && matrix.format() == Format::F32;
                    let bytes = if rounded { Format::Bf16.bytes_for(rows, cols) } else { matrix.byte_len() };
                    bytes as u64
                }
                _ => 4 * shape.iter().product::<usize>() as u64,
            };
            match block {
                Some(layer) => blocks[layer] += bytes,
                // Of the embeddings only the rows of a batch's tokens are ever touched.
                None if name == head => rest += bytes,
                None => {}
            }
        }
        Ok(match config.weights {
            Residency::Resident => Self { resident: blocks.iter().sum::<u64>() + rest, streamed_head: 0 },
            Residency::Streamed => {
                Self { resident: blocks.into_iter().max().unwrap_or(0), streamed_head: rest }
            }
        })
    }
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

    /// The output projection. Where it is tied to the embeddings, these stay as they are.
    pub fn head(&self, weight: Arc<FrozenMatrix>) -> FrozenLinear {
        self.linear(self.rounded(weight), None)
    }

    fn rounded(&self, weight: Arc<FrozenMatrix>) -> Arc<FrozenMatrix> {
        if self.config.rounds_at_load() && computes_on_host(self.device) {
            Arc::new(Arc::unwrap_or_clone(weight).rounded_to_bf16())
        } else {
            weight
        }
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
        let format = weight.format();
        let weight = self.rounded(weight);
        if weight.format() != format {
            self.base.pages(&format!("{name}.weight")).iter().for_each(Pages::release);
        }
        let bias = if bias { Some(self.vector(&format!("{name}.bias"))?) } else { None };
        let linear = match self.config.weights {
            Residency::Resident => self.linear(weight, bias),
            Residency::Streamed => FrozenLinear::on_host(weight, self.config.precision, bias),
        };
        Ok(LoraLinear::new(name, linear))
    }

    /// Where the tensors of the blocks, and those around them, lie in the base's files.
    pub fn streamed(&self, layers: Range<usize>) -> Streamed {
        let names: Vec<String> = self.base.config.tensors().into_iter().map(|(name, _)| name).collect();
        let under = |prefix: &str| {
            let names = names.iter().filter(|name| name.starts_with(prefix));
            names.flat_map(|name| self.base.pages(name)).collect()
        };
        let rest = ["model.embed_tokens.", "lm_head."].iter().flat_map(|prefix| under(prefix)).collect();
        Streamed { blocks: layers.map(|layer| under(&block_prefix(layer))).collect(), rest }
    }

    fn count(&mut self) {
        self.done += 1;
        (self.progress)(self.done);
    }
}
