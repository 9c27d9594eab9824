// Loops have to end up inside the functions of `wide` that are compiled for wider vectors.
#![allow(clippy::inline_always)]

#[cfg(feature = "cube")]
mod card;
mod rows;

use std::sync::Arc;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::{Shape, Tensor};

use crate::host::{Host, has_loops};
use crate::{FrozenLinear, plain, soft_cap};

/// Logits alive at a time, 32 MB of them: 256 rows at a vocabulary of 32,000.
const LOGITS: usize = 8 << 20;

/// How many rows of logits are alive at a time.
pub fn logit_rows(vocab_size: usize) -> usize {
    (LOGITS / vocab_size.max(1)).clamp(32, 1024)
}

/// Sum of the losses and the gradients that were asked for.
#[derive(Debug, Clone)]
pub struct CrossEntropy {
    /// `sum(-log p(target))`, `[1]`, still on the device.
    pub sum: Tensor<1>,
    /// Gradient of `sum` with respect to the hidden states, `[rows, hidden]`.
    pub gradient: Option<Tensor<2>>,
    /// Gradient of `sum` with respect to the head's weight, `[vocab, hidden]`.
    pub head_gradient: Option<Tensor<2>>,
}

/// What a loss is differentiated by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LossGradients {
    /// Nothing.
    None,
    /// The hidden states.
    Hidden,
    /// Those, and the weight of the head, where it is trained.
    HiddenAndHead,
}

/// Cross-entropy straight from the hidden states, through the output projection `head`, a chunk of
/// rows at a time, so that the full logits never exist.
///
/// This is the end of the graph, so gradients are written down rather than recorded: with
/// `p = softmax(h W^T)` that of `h` is `(p - onehot(target)) W`, and that of `W`, where the head is trained, the sum of
/// the chunks' `(p - onehot(target))^T h`. Where logits are capped at `cap`, as [`soft_cap()`] does it, each of a
/// row's logits passes on only the slope of the cap there, `1 - (capped / cap)^2`.
///
/// # Shapes
/// - hidden: `[rows, hidden]`, only rows that have a target; targets: one id for each
/// - head: from `hidden` to the vocabulary
///
/// # Panics
/// Where a target is no row of the head.
pub fn cross_entropy(
    hidden: &Tensor<2>,
    head: &FrozenLinear,
    targets: &[u32],
    cap: Option<f32>,
    wanted: LossGradients,
) -> CrossEntropy {
    let rows = logit_rows(head.out_features());
    let mut sum = Tensor::<1>::zeros([1], &hidden.device());
    let (mut gradients, mut head_gradient) = (Vec::new(), None);
    for (i, chunk) in targets.chunks(rows).enumerate() {
        let states = hidden.clone().narrow(0, i * rows, chunk.len());
        let logits = head.forward(states.clone()); // [rows, vocab]
        let logits = if let Some(cap) = cap { soft_cap(logits, cap) } else { logits };
        let of_cap = cap.filter(|_| wanted != LossGradients::None);
        let of_cap = of_cap.map(|cap| (logits.clone() / cap).square().neg().add_scalar(1.0));
        let (losses, slopes) = losses_and_slopes(logits, chunk);
        sum = sum + losses.sum();
        if wanted == LossGradients::None {
            continue;
        }
        let slopes = match of_cap {
            Some(of_cap) => slopes * of_cap,
            None => slopes,
        };
        if wanted == LossGradients::HiddenAndHead {
            let of_chunk = slopes.clone().transpose().matmul(states);
            head_gradient = Some(match head_gradient {
                Some(before) => before + of_chunk,
                None => of_chunk,
            });
        }
        gradients.push(head.backward(slopes));
    }
    let asked = wanted != LossGradients::None;
    // Without targets there are no rows, and nothing to concatenate.
    let gradient = if gradients.is_empty() { hidden.zeros_like() } else { Tensor::cat(gradients, 0) };
    CrossEntropy { sum, gradient: asked.then_some(gradient), head_gradient }
}

/// `-log softmax(logits)[target]` of each row, `[rows]`, and its gradient at the logits,
/// `softmax(logits) - onehot(target)`, `[rows, vocab]`: on the host in the same memory.
fn losses_and_slopes(logits: Tensor<2>, targets: &[u32]) -> (Tensor<1>, Tensor<2>) {
    if !has_loops(&logits) {
        return plain::losses_and_slopes(logits, targets);
    }
    let (losses, slopes) = Dispatch::losses_and_slopes(logits.into_dispatch(), targets.into());
    (Tensor::from_dispatch(losses), Tensor::from_dispatch(slopes))
}

/// The operation, for backends with loops of our own. Nothing is ever recorded here.
#[backend_extension(Flex: cfg(feature = "flex"), LibTorch: cfg(feature = "tch"), Cube: cfg(feature = "cube"))]
pub trait LossesAndSlopes: Backend {
    /// `[rows]` and `[rows, vocab]`.
    fn losses_and_slopes(
        logits: FloatTensor<Self>,
        targets: Arc<[u32]>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

impl<B: Host> LossesAndSlopes for B {
    fn losses_and_slopes(
        logits: FloatTensor<Self>,
        targets: Arc<[u32]>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let device = logits.device();
        B::write(Shape::from([targets.len()]), &device, |losses| {
            B::rewrite(logits, |logits| rows::losses_and_slopes(logits, &targets, losses)).0
        })
    }
}
