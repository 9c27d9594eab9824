//! One micro-batch, forwards and backwards.
//!
//! The frozen base never meets autodiff as a whole. The forward pass runs block by block on plain
//! tensors; the backward pass takes the blocks last to first, records one block's graph, and pulls
//! the gradient at its output back to its input and its adapters. A block's graph is recorded on the
//! way forward where there is memory to keep it; elsewhere only its input is kept, and the graph is
//! recorded in the backward pass, so that one such graph is alive at a time. Both compute the same
//! bits, unless saved inputs are rounded. Below the lowest adapter nothing is saved and nothing differentiated.

use burn::tensor::{IndexingUpdateOp, Int, Tensor, TensorData};
use pronk_data::PackedBatch;
use pronk_kernels::{
    CrossEntropy, Dropout, EmbeddingNoise, LossGradients, Tracked, cross_entropy, pull_back,
};
use pronk_lora::{Adapter, EMBED_TOKENS, ForwardMode, TensorKind, TensorName, WeightNorms};
use pronk_model::{Block, Decoder, Layout};
use tracing::trace_span;

use crate::saved_inputs::SavedInput;
use crate::spans::spanned;
use crate::{Gradients, SavedInputs};

/// What the forward pass of a micro-batch keeps for the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    /// How many blocks keep their graphs: the last ones, which the backward pass lets go first.
    pub graphs: usize,
    /// How the other blocks' inputs are kept.
    pub inputs: SavedInputs,
}

/// What a micro-batch came to.
#[derive(Debug, Clone)]
pub struct MicroBatchLoss {
    /// Sum of the losses of its supervised tokens, `[1]`, still on the device.
    pub sum: Tensor<1>,
    /// Of `sum / n_supervised`.
    pub gradients: Gradients,
}

/// Loss and adapter gradients of one micro-batch. `n_supervised` counts the supervised tokens of
/// the whole optimizer step: every loss is divided by it once, whichever micro-batch it is in.
pub fn loss_and_gradients(
    decoder: &Decoder,
    adapter: &Adapter,
    batch: &PackedBatch,
    n_supervised: usize,
    keep: Keep,
    dropout: Option<Dropout>,
    noise: Option<EmbeddingNoise>,
) -> MicroBatchLoss {
    let device = decoder.device();
    let documents = batch.documents();
    let layout = decoder.layout(&batch.positions, &documents);
    let norms = WeightNorms::default();
    let mode = ForwardMode { dropout, ..ForwardMode::inference(Some(adapter)).with_norms(&norms) };
    let embeddings = adapter.embeddings();
    let lowest = if embeddings.is_some() { 0 } else { lowest_adapted(decoder, adapter) };
    let recorded = decoder.layers().saturating_sub(keep.graphs);

    let record = |forward: Forward, block: &Block, layer: usize, x: Tensor<2>| {
        let adapter = adapter.tracked_under(&Decoder::block_prefix(layer));
        let input = (layer > lowest || embeddings.is_some()).then(|| x.clone().tracked());
        let mode = ForwardMode { adapter: Some(&adapter), ..mode };
        let output = forward(block, input.clone().unwrap_or(x), &layout, mode);
        Tape { input, adapter, output }
    };

    let mut x = decoder.embed(&batch.token_ids, Some(adapter));
    if let Some(noise) = noise {
        x = noise.apply(x, &documents);
    }
    let mut saved = Vec::new();
    for (layer, block) in decoder.visit(0..decoder.layers()) {
        x = spanned(&trace_span!("forward", layer), device, || {
            if layer < lowest {
                return block.forward(x, &layout, ForwardMode::inference(None), None);
            }
            if layer < recorded {
                saved.push(Saved::Input(keep.inputs.save(&x)));
                return block.forward(x, &layout, mode, None);
            }
            let forward: Forward = |block, x, layout, mode| block.forward(x, layout, mode, None);
            let tape = record(forward, &block, layer, x);
            let x = tape.output.clone().inner();
            saved.push(Saved::Tape(tape));
            x
        });
    }

    let mut gradients = Gradients::default();
    let head = || head_loss_and_gradient(decoder, adapter, x, batch, n_supervised, &mut gradients);
    let (loss, gradient) = spanned(&trace_span!("head"), device, head);
    let mut gradient = Some(gradient);
    for (layer, block) in decoder.visit((lowest..decoder.layers()).rev()) {
        let Some(above) = gradient.take() else { break };
        let tape = match saved.pop() {
            Some(Saved::Tape(tape)) => tape,
            Some(Saved::Input(x)) => {
                // Its output went into the next block on the way forward.
                let again = || record(Block::forward_unread, &block, layer, x.restored(device));
                spanned(&trace_span!("recompute", layer), device, again)
            }
            None => break,
        };
        let backward = || tape.pull_back(above, &mut gradients);
        gradient = spanned(&trace_span!("backward", layer), device, backward);
    }
    if let (Some(weight), Some(gradient)) = (embeddings, gradient) {
        let of_weight = decoder.embed_backward(&batch.token_ids, gradient, weight);
        gradients.add(TensorName::new(EMBED_TOKENS, TensorKind::Weight), of_weight);
    }
    MicroBatchLoss { sum: loss, gradients }
}

/// Sum of the losses of one micro-batch, `[1]`, without gradients.
pub fn loss_only(decoder: &Decoder, adapter: Option<&Adapter>, batch: &PackedBatch) -> Tensor<1> {
    let layout = decoder.layout(&batch.positions, &batch.documents());
    let hidden = decoder.hidden(&batch.token_ids, &layout, ForwardMode::inference(adapter));
    let (rows, targets) = labelled_rows(&hidden, batch);
    let rows = decoder.final_norm(hidden.select(0, rows));
    let head = decoder.lm_head(adapter);
    cross_entropy(&rows, &head, &targets, decoder.logit_cap(), LossGradients::None).sum
}

/// The first block that something is trained in.
fn lowest_adapted(decoder: &Decoder, adapter: &Adapter) -> usize {
    let adapted = |layer: &usize| {
        let prefix = Decoder::block_prefix(*layer);
        adapter.tensors().any(|(name, _)| name.module.starts_with(&prefix))
    };
    (0..decoder.layers()).find(adapted).unwrap_or(decoder.layers())
}

/// What the forward pass keeps of a block.
#[allow(clippy::large_enum_variant)] // one a block: a few dozen in all
enum Saved {
    Input(SavedInput),
    Tape(Tape),
}

/// A way through a block that is recorded.
type Forward = fn(&Block, Tensor<2>, &Layout, ForwardMode) -> Tensor<2>;

/// One block's autodiff graph, from its input and its adapters to its output.
struct Tape {
    /// `None` where nothing below wants a gradient.
    input: Option<Tensor<2>>,
    adapter: Adapter,
    output: Tensor<2>,
}

impl Tape {
    /// Adds the adapters' gradients to `gradients` and returns the input's.
    fn pull_back(self, gradient: Tensor<2>, gradients: &mut Gradients) -> Option<Tensor<2>> {
        let mut leaves = pull_back(&self.output, gradient);
        for (name, tensor) in self.adapter.tensors() {
            if let Some(gradient) = tensor.grad_remove(&mut leaves) {
                gradients.add(name, gradient);
            }
        }
        self.input.and_then(|x| x.grad_remove(&mut leaves))
    }
}

/// The loss at the end of the graph, and its gradient at the last block's output
/// `[tokens, hidden]`; that of the head's weight, where it is trained, is added to `gradients`. Only rows that have a
/// label are normed and projected.
fn head_loss_and_gradient(
    decoder: &Decoder,
    adapter: &Adapter,
    hidden: Tensor<2>,
    batch: &PackedBatch,
    n_supervised: usize,
    gradients: &mut Gradients,
) -> (Tensor<1>, Tensor<2>) {
    let (rows, targets) = labelled_rows(&hidden, batch);
    let zeros = hidden.zeros_like();
    let labelled = hidden.select(0, rows.clone()).tracked();
    let normed = decoder.final_norm(labelled.clone());
    let trained = adapter.head_name();
    let wanted = if trained.is_some() { LossGradients::HiddenAndHead } else { LossGradients::Hidden };
    let head = decoder.lm_head(Some(adapter));
    let CrossEntropy { sum, gradient, head_gradient } =
        cross_entropy(&normed.clone().inner(), &head, &targets, decoder.logit_cap(), wanted);
    if let (Some(name), Some(of_head)) = (trained, head_gradient) {
        gradients.add(name, of_head / n_supervised as f64);
    }
    let gradient = gradient.unwrap_or_else(|| normed.clone().inner().zeros_like());
    let mut leaves = pull_back(&normed, gradient / n_supervised as f64);
    let at_rows = labelled.grad_remove(&mut leaves).unwrap_or_else(|| labelled.inner().zeros_like());
    (sum, zeros.select_assign(0, rows, at_rows, IndexingUpdateOp::Add))
}

/// Rows whose hidden state predicts a supervised token, and those tokens.
fn labelled_rows(hidden: &Tensor<2>, batch: &PackedBatch) -> (Tensor<1, Int>, Vec<u32>) {
    let (rows, targets) = batch.labels();
    let rows: Vec<i64> = rows.into_iter().map(|row| row as i64).collect();
    let shape = [rows.len()];
    (Tensor::from_data(TensorData::new(rows, shape), &hidden.device()), targets)
}
