use std::ops::Range;

use burn::tensor::{Device, Int, Tensor, TensorData};
use pronk_kernels::{FrozenLinear, Rotary, rms_norm};
use pronk_lora::{ForwardMode, LoraLinear};

use crate::block::rotary;
use crate::config::block_prefix;
use crate::{Base, Block, DecoderConfig, LayerCache, Layout, ModelError};

/// A frozen base on a device.
#[derive(Debug, Clone)]
pub struct Decoder {
    /// What it looks like.
    pub config: DecoderConfig,
    blocks: Vec<Block>,
    embed_tokens: Tensor<2>,
    norm: Tensor<1>,
    lm_head: Tensor<2>,
    rotary: Rotary,
    device: Device,
}

impl Decoder {
    /// Reads `base` onto `device`, in float32. `progress` hears of each tensor: how many are
    /// there, and how many there will be.
    pub fn load(
        base: &Base,
        device: &Device,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Self, ModelError> {
        let config = base.config.clone();
        let total = config.tensors().len();
        let mut loader = Loader { base, device, done: 0, progress: &mut |done| progress(done, total) };
        let embed_tokens = loader.matrix("model.embed_tokens.weight")?;
        let blocks = (0..config.num_hidden_layers)
            .map(|layer| loader.block(&config, &block_prefix(layer)))
            .collect::<Result<_, _>>()?;
        let norm = loader.vector("model.norm.weight")?;
        let lm_head = if config.tie_word_embeddings {
            embed_tokens.clone()
        } else {
            loader.matrix("lm_head.weight")?
        };
        let rotary = rotary(&config);
        Ok(Self { config, blocks, embed_tokens, norm, lm_head, rotary, device: device.clone() })
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The blocks, first to last.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// What the names of a block's modules begin with.
    pub fn block_prefix(layer: usize) -> String {
        block_prefix(layer)
    }

    /// The output projection, `[vocab, hidden]`.
    pub fn lm_head(&self) -> &Tensor<2> {
        &self.lm_head
    }

    /// Embeddings of `token_ids`, `[tokens, hidden]`.
    pub fn embed(&self, token_ids: &[u32]) -> Tensor<2> {
        rows(self.embed_tokens.clone(), token_ids, &self.device)
    }

    /// The layout of records that lie one after another.
    pub fn layout(&self, positions: &[u32], documents: &[Range<usize>]) -> Layout {
        Layout::documents(&self.rotary, positions, documents, &self.device)
    }

    /// The norm in front of the output projection, `[rows, hidden]` to the same.
    pub fn final_norm(&self, x: Tensor<2>) -> Tensor<2> {
        rms_norm(x, &self.norm, self.config.rms_norm_eps)
    }

    /// Hidden states behind the last block, `[tokens, hidden]`.
    pub fn hidden(&self, token_ids: &[u32], layout: &Layout, mode: ForwardMode) -> Tensor<2> {
        let x = self.embed(token_ids);
        self.blocks.iter().fold(x, |x, block| block.forward(x, layout, mode, None))
    }

    /// Logits of every token of one text, `[tokens, vocab]`.
    pub fn logits(&self, token_ids: &[u32], mode: ForwardMode) -> Tensor<2> {
        let positions: Vec<u32> = (0..token_ids.len() as u32).collect();
        let whole: Range<usize> = 0..token_ids.len();
        let layout = self.layout(&positions, std::slice::from_ref(&whole));
        let hidden = self.hidden(token_ids, &layout, mode);
        self.project(hidden)
    }

    /// Logits of the last of `token_ids`, `[1, vocab]`, which stand behind the `before` tokens
    /// that `caches` hold, one cache a block.
    pub fn next_logits(
        &self,
        token_ids: &[u32],
        before: usize,
        caches: &mut [LayerCache],
        mode: ForwardMode,
    ) -> Tensor<2> {
        let layout = Layout::continuation(&self.rotary, before, token_ids.len(), &self.device);
        let mut x = self.embed(token_ids);
        for (block, cache) in self.blocks.iter().zip(caches) {
            x = block.forward(x, &layout, mode, Some(cache));
        }
        self.project(x.narrow(0, token_ids.len() - 1, 1))
    }

    fn project(&self, hidden: Tensor<2>) -> Tensor<2> {
        self.final_norm(hidden).matmul(self.lm_head.clone().transpose())
    }
}

/// What [`Decoder::logits`] computes, without a decoder: each block is read, run and dropped in
/// turn, so that a base of any size takes the memory of one block, or of its embeddings.
pub fn streamed_logits(
    base: &Base,
    device: &Device,
    token_ids: &[u32],
    mode: ForwardMode,
) -> Result<Tensor<2>, ModelError> {
    let config = &base.config;
    let mut loader = Loader { base, device, done: 0, progress: &mut |_| {} };
    let mut x = rows(loader.matrix("model.embed_tokens.weight")?, token_ids, device);
    let positions: Vec<u32> = (0..token_ids.len() as u32).collect();
    let whole: Range<usize> = 0..token_ids.len();
    let layout = Layout::documents(&rotary(config), &positions, std::slice::from_ref(&whole), device);
    for layer in 0..config.num_hidden_layers {
        x = loader.block(config, &block_prefix(layer))?.forward(x, &layout, mode, None);
    }
    let head = if config.tie_word_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" };
    let hidden = rms_norm(x, &loader.vector("model.norm.weight")?, config.rms_norm_eps);
    Ok(hidden.matmul(loader.matrix(head)?.transpose()))
}

/// Embeddings of `token_ids`, `[tokens, hidden]`.
fn rows(embed_tokens: Tensor<2>, token_ids: &[u32], device: &Device) -> Tensor<2> {
    let ids: Vec<i64> = token_ids.iter().map(|&id| i64::from(id)).collect();
    embed_tokens.select(0, Tensor::<1, Int>::from_data(TensorData::new(ids, [token_ids.len()]), device))
}

/// Reads tensors onto a device, counting them.
struct Loader<'a> {
    base: &'a Base,
    device: &'a Device,
    done: usize,
    progress: &'a mut dyn FnMut(usize),
}

impl Loader<'_> {
    fn tensor<const D: usize>(&mut self, name: &str) -> Result<Tensor<D>, ModelError> {
        let host = self.base.read(name)?;
        let tensor = Tensor::from_data(TensorData::new(host.to_f32(), host.shape), self.device);
        self.done += 1;
        (self.progress)(self.done);
        Ok(tensor)
    }

    fn matrix(&mut self, name: &str) -> Result<Tensor<2>, ModelError> {
        self.tensor(name)
    }

    fn vector(&mut self, name: &str) -> Result<Tensor<1>, ModelError> {
        self.tensor(name)
    }

    fn linear(&mut self, name: String, bias: bool) -> Result<LoraLinear, ModelError> {
        let weight = self.matrix(&format!("{name}.weight"))?;
        let bias = if bias { Some(self.vector(&format!("{name}.bias"))?) } else { None };
        Ok(LoraLinear::new(name, FrozenLinear::new(weight, bias)))
    }

    fn block(&mut self, config: &DecoderConfig, prefix: &str) -> Result<Block, ModelError> {
        let (attention, mlp) = (config.attention_bias, config.mlp_bias);
        let mut linear = |name: &str, bias| self.linear(format!("{prefix}{name}"), bias);
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
}
