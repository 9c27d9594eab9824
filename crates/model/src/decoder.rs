use std::iter::Peekable;
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Device, IndexingUpdateOp, Int, Tensor, TensorData};
use pronk_kernels::{FrozenLinear, FrozenMatrix, Precision, computes_on_host, rms_norm, soft_cap};
use pronk_lora::{Adapter, ForwardMode, LoraConfig, LoraError};

use crate::config::{EMBEDDINGS, block_prefix};
use crate::layout::Rotaries;
use crate::loader::{LoadConfig, Loader, Residency};
use crate::mapped::Pages;
use crate::{Base, Block, DecoderConfig, LayerCache, Layout, ModelError};

/// Where weights that come and go lie on the disk.
#[derive(Debug, Clone)]
pub(crate) struct Streamed {
    pub blocks: Vec<Vec<Pages>>,
    /// Embeddings and output projection.
    pub rest: Vec<Pages>,
}

/// A frozen base on a device.
#[derive(Debug, Clone)]
pub struct Decoder {
    /// What it looks like.
    pub config: DecoderConfig,
    blocks: Vec<Arc<Block>>,
    /// Set where weights are streamed from the disk.
    streamed: Option<Streamed>,
    embed_tokens: Arc<FrozenMatrix>,
    norm: Tensor<1>,
    lm_head: FrozenLinear,
    /// What factors of its products are rounded to.
    pub(crate) precision: Precision,
    rotaries: Rotaries,
    device: Device,
}

impl Decoder {
    /// Opens `base` for computing on `device`. On the host's processor weights stay where they are,
    /// mapped; CubeCL's cards get them in the same formats, LibTorch's in float32. `progress` hears of each tensor: how many are
    /// there, and how many there will be.
    pub fn load(
        base: &Base,
        device: &Device,
        config: LoadConfig,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Self, ModelError> {
        let total = base.config.tensors().len();
        let mut loader =
            Loader { base, device, config, done: 0, progress: &mut |done| progress(done, total) };
        let embed_tokens = loader.matrix(EMBEDDINGS)?;
        let layers = 0..base.config.num_hidden_layers;
        let blocks = layers.clone().map(|layer| loader.block(layer).map(Arc::new));
        let blocks = blocks.collect::<Result<_, _>>()?;
        let norm = loader.norm("model.norm.weight")?;
        let head_name = base.config.head_weight();
        let head = if base.config.tie_word_embeddings {
            Arc::clone(&embed_tokens)
        } else {
            loader.matrix(head_name)?
        };
        Ok(Self {
            config: base.config.clone(),
            blocks,
            streamed: (config.weights == Residency::Streamed).then(|| loader.streamed(layers)),
            embed_tokens,
            norm,
            lm_head: loader.head(head_name, head),
            precision: config.precision,
            rotaries: Rotaries::new(&base.config),
            device: device.clone(),
        })
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// How many blocks there are.
    pub fn layers(&self) -> usize {
        self.blocks.len()
    }

    /// The blocks of the layers in `order`, each with its number. Where weights are streamed, the
    /// next one is read while the caller computes with one, and one left behind is let go.
    pub fn visit<I: Iterator<Item = usize>>(&self, order: I) -> Visit<'_, I> {
        self.release_rest();
        Visit { decoder: self, order: order.peekable(), previous: None }
    }

    /// Embeddings and head come before and after the blocks, never among them.
    fn release_rest(&self) {
        self.streamed.iter().flat_map(|streamed| &streamed.rest).for_each(Pages::release);
    }

    /// What the names of a block's modules begin with.
    pub fn block_prefix(layer: usize) -> String {
        block_prefix(layer)
    }

    /// The output projection, from `hidden` to the vocabulary, before logits are capped: the adapter's,
    /// where it has one.
    pub fn lm_head(&self, adapter: Option<&Adapter>) -> FrozenLinear {
        match adapter.and_then(Adapter::head) {
            Some(weight) => FrozenLinear::new(weight.clone(), None),
            None => self.lm_head.clone(),
        }
    }

    /// Embeddings of `token_ids`, `[tokens, hidden]`: the adapter's, where it has some.
    ///
    /// # Panics
    /// Where an id has none.
    pub fn embed(&self, token_ids: &[u32], adapter: Option<&Adapter>) -> Tensor<2> {
        self.scaled(match adapter.and_then(Adapter::embeddings) {
            Some(weight) => weight.clone().select(0, self.indices(token_ids)),
            None => Tensor::from_data(self.embed_tokens.select(token_ids), &self.device),
        })
    }

    /// The gradient of the weight that [`Self::embed`] has taken, `[vocab, hidden]`, for `gradient` at what it
    /// gave: a token's rows summed, as often as it stands there. transformers gives the row of `pad_token_id` none;
    /// nothing is padded here, and where it is another token as well, that learns.
    pub fn embed_backward(&self, token_ids: &[u32], gradient: Tensor<2>, weight: &Tensor<2>) -> Tensor<2> {
        let gradient = self.scaled(gradient);
        weight.zeros_like().select_assign(0, self.indices(token_ids), gradient, IndexingUpdateOp::Add)
    }

    fn scaled(&self, rows: Tensor<2>) -> Tensor<2> {
        if self.config.traits().scaled_embeddings {
            rows * (self.config.hidden_size as f64).sqrt()
        } else {
            rows
        }
    }

    fn indices(&self, token_ids: &[u32]) -> Tensor<1, Int> {
        let ids: Vec<i64> = token_ids.iter().map(|&id| i64::from(id)).collect();
        Tensor::from_data(TensorData::new(ids, [token_ids.len()]), &self.device)
    }

    /// A fresh adapter for this base, that changes nothing yet.
    pub fn new_adapter(&self, config: &LoraConfig, seed: u64) -> Result<Adapter, LoraError> {
        let mut adapter = Adapter::init(config, &self.config.adapter_modules(), seed, &self.device)?;
        if config.use_dora {
            self.set_magnitudes(&mut adapter);
        }
        Ok(adapter)
    }

    /// Gives every pair of `adapter` the magnitudes with which `DoRA` computes what the pair alone does.
    pub fn set_magnitudes(&self, adapter: &mut Adapter) {
        for (_, block) in self.visit(0..self.layers()) {
            for linear in block.linears() {
                if let Some(pair) = adapter.pairs.get_mut(linear.name()) {
                    linear.set_magnitude(pair);
                }
            }
        }
    }

    /// The layout of records that lie one after another.
    pub fn layout(&self, positions: &[u32], documents: &[Range<usize>]) -> Layout {
        Layout::documents(&self.rotaries, positions, documents, &self.device)
    }

    /// The norm in front of the output projection, `[rows, hidden]` to the same.
    pub fn final_norm(&self, x: Tensor<2>) -> Tensor<2> {
        rms_norm(x, &self.norm, self.config.rms_norm_eps)
    }

    /// Hidden states behind the last block, `[tokens, hidden]`.
    pub fn hidden(&self, token_ids: &[u32], layout: &Layout, mode: ForwardMode) -> Tensor<2> {
        let x = self.embed(token_ids, mode.adapter);
        self.visit(0..self.layers()).fold(x, |x, (_, block)| block.forward(x, layout, mode, None))
    }

    /// Logits of every token of one text, `[tokens, vocab]`.
    pub fn logits(&self, token_ids: &[u32], mode: ForwardMode) -> Tensor<2> {
        let positions: Vec<u32> = (0..token_ids.len() as u32).collect();
        let whole: Range<usize> = 0..token_ids.len();
        let layout = self.layout(&positions, std::slice::from_ref(&whole));
        let hidden = self.hidden(token_ids, &layout, mode);
        self.project(hidden, mode)
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
        let layout = Layout::continuation(&self.rotaries, before, token_ids.len(), &self.device);
        let mut x = self.embed(token_ids, mode.adapter);
        for ((_, block), cache) in self.visit(0..self.layers()).zip(caches) {
            x = block.forward(x, &layout, mode, Some(cache));
        }
        self.project(x.narrow(0, token_ids.len() - 1, 1), mode)
    }

    /// What the logits are capped at, as [`soft_cap()`] does it.
    pub fn logit_cap(&self) -> Option<f32> {
        self.config.final_logit_softcapping.map(|cap| cap as f32)
    }

    fn project(&self, hidden: Tensor<2>, mode: ForwardMode) -> Tensor<2> {
        let logits = self.lm_head(mode.adapter).forward(self.final_norm(hidden));
        if let Some(cap) = self.logit_cap() { soft_cap(logits, cap) } else { logits }
    }
}

/// See [`Decoder::visit`].
#[derive(Debug)]
pub struct Visit<'a, I: Iterator<Item = usize>> {
    decoder: &'a Decoder,
    order: Peekable<I>,
    previous: Option<usize>,
}

impl<I: Iterator<Item = usize>> Iterator for Visit<'_, I> {
    type Item = (usize, Arc<Block>);

    fn next(&mut self) -> Option<Self::Item> {
        self.leave();
        let layer = self.order.next()?;
        let block = Arc::clone(&self.decoder.blocks[layer]);
        let Some(streamed) = &self.decoder.streamed else { return Some((layer, block)) };
        self.previous = Some(layer);
        if let Some(&next) = self.order.peek() {
            let next = streamed.blocks[next].clone();
            std::thread::spawn(move || next.iter().for_each(Pages::read_ahead));
        }
        let here = computes_on_host(&self.decoder.device);
        Some((layer, if here { block } else { Arc::new(block.on_device(&self.decoder.device)) }))
    }
}

impl<I: Iterator<Item = usize>> Visit<'_, I> {
    fn leave(&mut self) {
        if let (Some(streamed), Some(layer)) = (&self.decoder.streamed, self.previous.take()) {
            streamed.blocks[layer].iter().for_each(Pages::release);
        }
    }
}

impl<I: Iterator<Item = usize>> Drop for Visit<'_, I> {
    fn drop(&mut self) {
        self.leave();
    }
}
