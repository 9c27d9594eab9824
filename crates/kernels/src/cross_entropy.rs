use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::{Int, Tensor, TensorData};
use rayon::prelude::*;

use crate::FrozenLinear;
use crate::exp::exp;
use crate::frozen::wide::widest;
use crate::host::{Host, lends};

/// Logits alive at a time, 32 MB of them: 256 rows at a vocabulary of 32,000.
const LOGITS: usize = 8 << 20;

/// `e^x` of what is at most 0. On the host in vectors, and in the same memory.
fn exponentials(x: Tensor<2>) -> Tensor<2> {
    if lends(&x) { Tensor::from_dispatch(Dispatch::exponentials(x.into_dispatch())) } else { x.exp() }
}

/// The operation, for backends that lend their numbers. Nothing is ever recorded here.
#[backend_extension(Flex: cfg(feature = "flex"), LibTorch: cfg(feature = "tch"))]
pub trait Exponentials: Backend {
    /// `e^x`
    fn exponentials(x: FloatTensor<Self>) -> FloatTensor<Self>;
}

impl<B: Host> Exponentials for B {
    fn exponentials(x: FloatTensor<Self>) -> FloatTensor<Self> {
        const PIECE: usize = 1 << 14;
        let replace = |piece: &mut [f32]| widest(|| piece.iter_mut().for_each(|x| *x = exp(*x)));
        B::rewrite(B::contiguous(x), |x| x.pieces(PIECE).for_each(replace)).0
    }
}

/// How many rows of logits are alive at a time.
pub fn logit_rows(vocab_size: usize) -> usize {
    (LOGITS / vocab_size.max(1)).clamp(32, 1024)
}

/// Sum of the losses and, where asked for, their gradient.
#[derive(Debug, Clone)]
pub struct CrossEntropy {
    /// `sum(-log p(target))`, `[1]`, still on the device.
    pub sum: Tensor<1>,
    /// Gradient of `sum` with respect to the hidden states, `[rows, hidden]`.
    pub gradient: Option<Tensor<2>>,
}

/// Cross-entropy straight from the hidden states, through the output projection `head`, a chunk of
/// rows at a time, so that the full logits never exist.
///
/// The head is frozen and this is the end of the graph, so the gradient is written down rather
/// than recorded: with `p = softmax(h W^T)` it is `p W - W[target]`.
///
/// # Shapes
/// - hidden: `[rows, hidden]`, only rows that have a target; targets: one id for each
/// - head: from `hidden` to the vocabulary
pub fn cross_entropy(
    hidden: &Tensor<2>,
    head: &FrozenLinear,
    targets: &[u32],
    with_gradient: bool,
) -> CrossEntropy {
    let device = hidden.device();
    let rows = logit_rows(head.out_features());
    let mut sum = Tensor::<1>::zeros([1], &device);
    let mut gradients = Vec::new();
    for (i, chunk) in targets.chunks(rows).enumerate() {
        let logits = head.forward(hidden.clone().narrow(0, i * rows, chunk.len())); // [rows, vocab]
        let ids: Vec<i64> = chunk.iter().map(|&t| i64::from(t)).collect();
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [chunk.len(), 1]), &device);
        let target_logits = logits.clone().gather(1, ids);
        let top = logits.clone().max_dim(1);
        let weights = exponentials(logits - top.clone());
        let total = weights.clone().sum_dim(1); // [rows, 1]
        sum = sum + (total.clone().log() + top - target_logits).sum();
        if with_gradient {
            gradients.push(head.backward(weights / total) - head.rows(chunk, &device));
        }
    }
    // Without targets there are no rows, and nothing to concatenate.
    let gradient = if gradients.is_empty() { hidden.zeros_like() } else { Tensor::cat(gradients, 0) };
    CrossEntropy { sum, gradient: with_gradient.then_some(gradient) }
}
