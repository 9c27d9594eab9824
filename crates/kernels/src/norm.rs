// Loops have to end up inside the functions of `wide` that are compiled for wider vectors.
#![allow(clippy::inline_always)]

#[cfg(feature = "cube")]
mod card;
mod rows;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind, unary};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::Tensor;

use crate::host::{Host, Loops, has_loops};
use crate::plain;

/// Root mean square normalization, `y = x / sqrt(mean(x^2) + eps) * weight`
/// (Zhang and Sennrich 2019, <https://arxiv.org/abs/1910.07467>). The weight is frozen: no gradient
/// arrives there.
///
/// # Shapes
/// - x: `[tokens, hidden]`, weight: `[hidden]`
/// - result: `[tokens, hidden]`
///
/// # Panics
/// Where the shapes do not fit.
pub fn rms_norm(x: Tensor<2>, weight: &Tensor<1>, eps: f64) -> Tensor<2> {
    if !has_loops(&x) {
        return plain::rms_norm(x, &weight.clone().detach(), eps);
    }
    let weight = weight.clone().into_dispatch();
    Tensor::from_dispatch(Dispatch::rms_norm(x.into_dispatch(), weight, eps as f32))
}

/// The operation, for backends with loops of our own.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    LibTorch: cfg(feature = "tch"),
    Cube: cfg(feature = "cube"),
    Autodiff,
)]
pub trait RmsNorm: Backend {
    /// See [`rms_norm`].
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self>;
}

/// The loops, over tensors whose numbers are in order.
trait NormLoops: Loops {
    /// Returns the scale of each row too.
    fn forward(
        x: FloatTensor<Self>,
        weight: &FloatTensor<Self>,
        eps: f32,
    ) -> (FloatTensor<Self>, Self::Numbers);

    /// The gradient at `x`.
    fn backward(
        dy: FloatTensor<Self>,
        x: &FloatTensor<Self>,
        weight: &FloatTensor<Self>,
        scales: &Self::Numbers,
    ) -> FloatTensor<Self>;
}

impl<B: Host> NormLoops for B {
    fn forward(x: FloatTensor<Self>, weight: &FloatTensor<Self>, eps: f32) -> (FloatTensor<Self>, Vec<f32>) {
        B::rewrite(x, |x| rows::forward(x, B::numbers(weight), eps))
    }

    fn backward(
        dy: FloatTensor<Self>,
        x: &FloatTensor<Self>,
        weight: &FloatTensor<Self>,
        scales: &Vec<f32>,
    ) -> FloatTensor<Self> {
        B::rewrite(dy, |dy| rows::backward(dy, B::numbers(x), B::numbers(weight), scales)).0
    }
}

impl<B: NormLoops> RmsNorm for B {
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        assert_eq!(x.shape()[1], weight.shape()[0], "a weight for every feature");
        B::forward(x, &B::contiguous(weight), eps).0
    }
}

impl<B: NormLoops, C: CheckpointStrategy> RmsNorm for Autodiff<B, C> {
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        let operation = Recorded.prepare::<C>([x.node()]).compute_bound().stateful();
        let (x, weight) = (x.into_primitive(), B::contiguous(weight.into_primitive()));
        assert_eq!(x.shape()[1], weight.shape()[0], "a weight for every feature");
        match operation {
            OpsKind::Tracked(prep) => {
                let x = B::contiguous(x);
                let (y, scales) = B::forward(x.clone(), &weight, eps);
                prep.finish((x, weight, scales), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::forward(x, &weight, eps).0),
        }
    }
}

/// The normalization in an autodiff graph.
#[derive(Debug)]
struct Recorded;

impl<B: NormLoops> Backward<B, 1> for Recorded {
    /// x, the weight, and the scale of each row.
    type State = (FloatTensor<B>, FloatTensor<B>, B::Numbers);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (x, weight, scales) = ops.state;
        unary::<B, _>(ops.parents, ops.node, grads, |dy| {
            <B as NormLoops>::backward(dy, &x, &weight, &scales)
        });
    }
}
