// Loops have to end up inside the functions of `wide` that are compiled for wider vectors.
#![allow(clippy::inline_always)]

#[cfg(feature = "cube")]
mod card;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind, unary};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::frozen::wide::widest;
use crate::host::{Host, Loops, has_loops};
use crate::plain;
use crate::random::Bits;

/// What a mask depends on, and nothing else: the same key draws the same mask, whether a block
/// runs for the first time, is recomputed for its gradients, or belongs to a resumed run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DropoutKey {
    /// The run's seed.
    pub seed: u64,
    /// The optimizer step.
    pub step: u64,
    /// The micro-batch within the step.
    pub micro_batch: u64,
}

/// Inverted dropout with probability `p` (Srivastava et al. 2014).
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    /// Share of the features set to zero, in `[0, 1)`.
    pub p: f64,
    /// Where in the run the masks belong.
    pub key: DropoutKey,
}

impl Dropout {
    /// The mask of the layer called `name`; none where nothing is dropped.
    pub fn mask(&self, name: &str) -> Option<Mask> {
        (self.p > 0.0).then(|| Mask {
            bits: Bits::of(&(self.key, name)),
            least: (self.p * 2_f64.powi(32)) as u32,
            scale: (1.0 / (1.0 - self.p)) as f32,
        })
    }

    /// `x` with its mask for the layer called `name`, the kept features scaled by `1 / (1 - p)`.
    ///
    /// # Shapes
    /// - x and result: `[tokens, features]`
    pub fn apply(&self, x: Tensor<2>, name: &str) -> Tensor<2> {
        match self.mask(name) {
            Some(mask) => mask.hide(x),
            None => x,
        }
    }
}

/// Which features of which token are kept: nothing is stored of it but what it is computed from.
#[derive(Debug, Clone, Copy)]
pub struct Mask {
    bits: Bits,
    /// The least number whose feature is kept.
    least: u32,
    /// What is kept is multiplied by it.
    scale: f32,
}

impl Mask {
    /// `x` with zeros for what is dropped, the rest scaled.
    ///
    /// # Shapes
    /// - x and result: `[tokens, features]`
    pub fn hide(self, x: Tensor<2>) -> Tensor<2> {
        if !has_loops(&x) {
            return plain::dropout(x, self);
        }
        Tensor::from_dispatch(Dispatch::masked(x.into_dispatch(), self))
    }

    /// Masks rows of `width` numbers, the first of them that of `token`.
    pub(crate) fn apply(&self, token: usize, rows: &mut [f32], width: usize) {
        self.apply_to_features(token, 0, rows, width);
    }

    /// The same for rows of some features, from `feature` on.
    pub(crate) fn apply_to_features(&self, token: usize, feature: usize, rows: &mut [f32], width: usize) {
        for (i, row) in rows.chunks_exact_mut(width).enumerate() {
            widest!(|| self.apply_to_row(token + i, feature, row));
        }
    }

    #[inline(always)]
    fn apply_to_row(&self, token: usize, feature: usize, row: &mut [f32]) {
        let bits = self.bits.row(token);
        for (i, x) in row.iter_mut().enumerate() {
            *x = if bits.at(feature + i) < self.least { 0.0 } else { *x * self.scale };
        }
    }
}

/// The operation, for backends with loops of our own.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    LibTorch: cfg(feature = "tch"),
    Cube: cfg(feature = "cube"),
    Autodiff,
)]
pub trait Masked: Backend {
    /// `x`, `[tokens, features]`, with zeros for what `mask` drops, the rest scaled.
    fn masked(x: FloatTensor<Self>, mask: Mask) -> FloatTensor<Self>;
}

impl<B: Host> Masked for B {
    fn masked(x: FloatTensor<Self>, mask: Mask) -> FloatTensor<Self> {
        let width = x.shape()[1].max(1);
        B::rewrite(x, |x| {
            x.pieces(width).enumerate().for_each(|(token, row)| mask.apply(token, row, width));
        })
        .0
    }
}

impl<B: Masked + Loops, C: CheckpointStrategy> Masked for Autodiff<B, C> {
    fn masked(x: FloatTensor<Self>, mask: Mask) -> FloatTensor<Self> {
        let operation = Recorded.prepare::<C>([x.node()]).compute_bound().stateful();
        let y = B::masked(x.into_primitive(), mask);
        match operation {
            OpsKind::Tracked(prep) => prep.finish(mask, y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}

/// Dropout in an autodiff graph.
#[derive(Debug)]
struct Recorded;

impl<B: Masked> Backward<B, 1> for Recorded {
    type State = Mask;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        unary::<B, _>(ops.parents, ops.node, grads, |dy| B::masked(dy, ops.state));
    }
}
