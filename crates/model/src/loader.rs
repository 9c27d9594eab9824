//! From a base on the disk to layers that compute.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use pronk_kernels::{Format, FrozenLinear, FrozenMatrix, Precision, computes_on_host, dense_bytes_on_card};
use pronk_lora::LoraLinear;

use crate::block::NormsAround;
use crate::config::{GATE_UP, GATE_UP_PROJ, QK_NORMS, QKV, QKV_PROJ, block_prefix};
use crate::decoder::Streamed;
use crate::family::Norms;
use crate::mapped::Pages;
use crate::projections::Projections;
use crate::{Base, Block, ModelError, Quantization};

/// How a decoder holds its weights and multiplies with them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadConfig {
    /// What factors of products are rounded to.
    pub precision: Precision,
    /// Whether all blocks stay in memory.
    pub weights: Residency,
}

impl LoadConfig {
    /// Whether wider floats become bf16 once, at load, rather than at every product.
    fn rounds_at_load(self) -> bool {
        self.weights == Residency::Resident && self.precision.is_bf16_here()
    }

    /// The format that a matrix is kept in while it computes, and its bytes.
    fn kept(self, matrix: &FrozenMatrix, memory: Memory) -> (Format, usize) {
        let [rows, cols] = matrix.shape();
        if memory == Memory::Host && self.rounds_at_load() && matrix.format() == Format::F32 {
            (Format::Bf16, Format::Bf16.bytes_for(rows, cols))
        } else {
            (matrix.format(), matrix.byte_len())
        }
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

/// The memory that weights are multiplied in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// This machine's own.
    Host,
    /// A graphics card's.
    Card,
}

impl Memory {
    /// Where `device` keeps its tensors.
    pub fn of(device: &Device) -> Self {
        if computes_on_host(device) { Self::Host } else { Self::Card }
    }
}

/// Bytes of a base's weights while it computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightBytes {
    /// Where they are.
    pub memory: Memory,
    /// What factors of products with them are rounded to.
    pub precision: Precision,
    /// Of those that are there while blocks compute: everything, or where blocks are streamed the largest
    /// block. A card holds the output projection all the time.
    pub resident: u64,
    /// Of the output projection, where the blocks are gone while it computes.
    pub streamed_head: u64,
    /// Of the one matrix that is dense for its product, on a card.
    pub dense: u64,
}

impl WeightBytes {
    /// As `base` keeps them, or quantized. Nothing is read beyond headers.
    pub fn of(
        base: &Base,
        config: LoadConfig,
        quantization: Option<&Quantization>,
        memory: Memory,
    ) -> Result<Self, ModelError> {
        if let Some(quantization) = quantization {
            quantization.check(base)?;
        }
        let (mut blocks, mut rest, mut dense) = (vec![0; base.config.num_hidden_layers], 0, 0);
        let head = base.config.head_weight();
        for (name, shape) in base.config.tensors() {
            let block = (0..blocks.len()).find(|&layer| name.starts_with(&block_prefix(layer)));
            let bytes = if let &[rows, cols] = &shape[..] {
                let matrix = base.matrix(&name)?;
                let (kept, bytes) = match quantization {
                    Some(quantization) => {
                        let format = quantization.format_of(&name, matrix.format());
                        (format, format.bytes_for(rows, cols))
                    }
                    None => config.kept(&matrix, memory),
                };
                if memory == Memory::Card && (block.is_some() || name == head) {
                    dense = dense.max(dense_bytes_on_card(kept, [rows, cols], config.precision));
                }
                bytes as u64
            } else {
                4 * shape.iter().product::<usize>() as u64
            };
            match block {
                Some(layer) => blocks[layer] += bytes,
                // Of the embeddings only the rows of a batch's tokens are ever touched.
                None if name == head => rest += bytes,
                None => {}
            }
        }
        let (resident, streamed_head) = match (config.weights, blocks.iter().max().copied().unwrap_or(0)) {
            (Residency::Resident, _) => (blocks.iter().sum::<u64>() + rest, 0),
            (Residency::Streamed, block) if memory == Memory::Card => (block + rest, rest),
            (Residency::Streamed, block) => (block, rest),
        };
        Ok(Self { memory, precision: config.precision, resident, streamed_head, dense: dense as u64 })
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

    /// A layer where it will compute: another device than the host's processor gets a copy of its own,
    /// in memory of just that size, and the host's pages go.
    fn linear(&self, name: &str, weight: Arc<FrozenMatrix>, bias: Option<Tensor<1>>) -> FrozenLinear {
        let linear = FrozenLinear::on_host(weight, self.config.precision, bias);
        if computes_on_host(self.device) {
            return linear;
        }
        let linear = self.device.memory_persistent_allocations(linear, |l| l.on_device(self.device));
        self.base.pages(name).iter().for_each(Pages::release);
        linear
    }

    /// The output projection called `name`. Where it is tied to the embeddings, these stay as they are.
    pub fn head(&self, name: &str, weight: Arc<FrozenMatrix>) -> FrozenLinear {
        self.linear(name, self.rounded(weight), None)
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
        let traits = config.traits();
        let prefix = block_prefix(layer);
        let [q, kv] = config.attention_widths();
        let inner = config.intermediate_size;
        let [attention, feed_forward] = traits.norms;
        Ok(Block {
            attention_norms: self.norms(&prefix, attention)?,
            qkv: self.projections(&prefix, QKV, QKV_PROJ, [q, kv, kv])?,
            qk_norms: if traits.qk_norm {
                let [q, k] = QK_NORMS.map(|name| self.norm(&format!("{prefix}{name}.weight")));
                Some([q?, k?])
            } else {
                None
            },
            o_proj: self.lora_linear(format!("{prefix}self_attn.o_proj"))?,
            feed_forward_norms: self.norms(&prefix, feed_forward)?,
            gate_up: self.projections(&prefix, GATE_UP, GATE_UP_PROJ, [inner, inner])?,
            down_proj: self.lora_linear(format!("{prefix}mlp.down_proj"))?,
            activation: traits.activation,
            scoring: config.scoring(layer, self.config.precision),
            head_dim: config.head_dim,
            rms_norm_eps: config.rms_norm_eps,
        })
    }

    /// The weight of a norm, as it multiplies.
    pub fn norm(&mut self, name: &str) -> Result<Tensor<1>, ModelError> {
        let weight = self.vector(name)?;
        Ok(if self.base.config.traits().norms_less_one { weight + 1.0 } else { weight })
    }

    fn norms(&mut self, prefix: &str, names: Norms) -> Result<NormsAround, ModelError> {
        let mut norm = |name: &str| self.norm(&format!("{prefix}{name}.weight"));
        Ok(NormsAround { before: norm(names.before)?, after: names.after.map(norm).transpose()? })
    }

    /// Layers of the block called `prefix` that read the same input; `widths` of their outputs.
    fn projections<const N: usize>(
        &mut self,
        prefix: &str,
        names: [&str; N],
        packed: &str,
        widths: [usize; N],
    ) -> Result<Projections<N>, ModelError> {
        let names = names.map(|name| format!("{prefix}{name}"));
        if self.base.config.traits().packed {
            let layer = self.lora_linear(format!("{prefix}{packed}"))?;
            let mut widths = widths.into_iter();
            let parts = names.map(|name| (name, widths.next().unwrap_or_default()));
            return Ok(Projections::Packed(layer, parts));
        }
        let layers: Vec<LoraLinear> =
            names.into_iter().map(|name| self.lora_linear(name)).collect::<Result<_, _>>()?;
        let all = <[LoraLinear; N]>::try_from(layers);
        all.map(Projections::Apart).map_err(|_| ModelError::malformed(&self.base.path, "layers of a block"))
    }

    fn lora_linear(&mut self, name: String) -> Result<LoraLinear, ModelError> {
        let bias = self.base.config.has_bias(&name);
        let matrix = format!("{name}.weight");
        let weight = self.matrix(&matrix)?;
        let format = weight.format();
        let weight = self.rounded(weight);
        if weight.format() != format {
            self.base.pages(&matrix).iter().for_each(Pages::release);
        }
        let bias = if bias { Some(self.vector(&format!("{name}.bias"))?) } else { None };
        let linear = match self.config.weights {
            Residency::Resident => self.linear(&matrix, weight, bias),
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
