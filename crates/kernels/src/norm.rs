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
use crate::outputs::{self, Arrived, nothing};
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

/// `x` and [`rms_norm`] of it, for a stream that goes on beside what is made of its norm: on the way back both gradients
/// become one in one pass.
///
/// # Shapes
/// - x: `[tokens, hidden]`, weight: `[hidden]`
/// - results: `[tokens, hidden]`
///
/// # Panics
/// Where the shapes do not fit.
pub fn rms_norm_beside(x: Tensor<2>, weight: &Tensor<1>, eps: f64) -> [Tensor<2>; 2] {
    if !has_loops(&x) {
        return [x.clone(), rms_norm(x, weight, eps)];
    }
    let weight = weight.clone().into_dispatch();
    let (x, y) = Dispatch::rms_norm_beside(x.into_dispatch(), weight, eps as f32);
    [x, y].map(Tensor::from_dispatch)
}

/// The operations, for backends with loops of our own.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    LibTorch: cfg(feature = "tch"),
    Cube: cfg(feature = "cube"),
    Autodiff,
)]
pub trait RmsNorm: Backend {
    /// See [`rms_norm`].
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self>;

    /// See [`rms_norm_beside`].
    fn rms_norm_beside(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

/// The loops, over tensors whose numbers are in order.
trait NormLoops: Loops {
    /// Returns the scale of each row too.
    fn forward(
        x: FloatTensor<Self>,
        weight: &FloatTensor<Self>,
        eps: f32,
    ) -> (FloatTensor<Self>, Self::Numbers);

    /// The gradient at `x`, with what it gets besides.
    fn backward(
        dy: FloatTensor<Self>,
        beside: Option<FloatTensor<Self>>,
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
        beside: Option<FloatTensor<Self>>,
        x: &FloatTensor<Self>,
        weight: &FloatTensor<Self>,
        scales: &Vec<f32>,
    ) -> FloatTensor<Self> {
        let beside = beside.map(B::contiguous);
        let beside = beside.as_ref().map(B::numbers);
        B::rewrite(dy, |dy| rows::backward(dy, beside, B::numbers(x), B::numbers(weight), scales)).0
    }
}

impl<B: NormLoops> RmsNorm for B {
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        assert_eq!(x.shape()[1], weight.shape()[0], "a weight for every feature");
        B::forward(x, &B::contiguous(weight), eps).0
    }

    fn rms_norm_beside(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        (x.clone(), B::rms_norm(x, weight, eps))
    }
}

impl<B: NormLoops, C: CheckpointStrategy> RmsNorm for Autodiff<B, C> {
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        let operation = Alone.prepare::<C>([x.node()]).compute_bound().stateful();
        match operation {
            OpsKind::Tracked(prep) => {
                let (saved, y) = Saved::<B>::of(x.into_primitive(), weight.into_primitive(), eps);
                prep.finish(saved, y)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::rms_norm(x.into_primitive(), weight.into_primitive(), eps))
            }
        }
    }

    fn rms_norm_beside(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let operation = Beside.prepare::<C>([x.node()]).compute_bound().stateful();
        let OpsKind::Tracked(prep) = operation else { return (x.clone(), Self::rms_norm(x, weight, eps)) };
        let (saved, y) = Saved::<B>::of(x.into_primitive(), weight.into_primitive(), eps);
        let (arrived, x) = (Arrived::none(), saved.x.clone());
        let node = prep.finish((saved, arrived.clone()), nothing::<B>(&x.device()));
        let [x, y] = outputs::results::<B, C, 2>(&node, &arrived, [x, y]);
        (x, y)
    }
}

/// What the backward pass needs.
#[derive(Debug, Clone)]
struct Saved<B: NormLoops> {
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    /// Of each row.
    scales: B::Numbers,
}

impl<B: NormLoops> Saved<B> {
    /// The norm of `x`, and what of it is saved.
    fn of(x: FloatTensor<B>, weight: FloatTensor<B>, eps: f32) -> (Self, FloatTensor<B>) {
        assert_eq!(x.shape()[1], weight.shape()[0], "a weight for every feature");
        let [x, weight] = [x, weight].map(B::contiguous);
        let (y, scales) = B::forward(x.clone(), &weight, eps);
        (Self { x, weight, scales }, y)
    }

    /// The gradient at `x`.
    fn pull_back(&self, dy: FloatTensor<B>, beside: Option<FloatTensor<B>>) -> FloatTensor<B> {
        <B as NormLoops>::backward(dy, beside, &self.x, &self.weight, &self.scales)
    }
}

/// The normalization in an autodiff graph.
#[derive(Debug)]
struct Alone;

impl<B: NormLoops> Backward<B, 1> for Alone {
    type State = Saved<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        unary::<B, _>(ops.parents, ops.node, grads, |dy| ops.state.pull_back(dy, None));
    }
}

/// The normalization with its input beside it in an autodiff graph.
#[derive(Debug)]
struct Beside;

impl<B: NormLoops> Backward<B, 1> for Beside {
    type State = (Saved<B>, Arrived<FloatTensor<B>, 2>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (saved, arrived) = ops.state;
        grads.consume::<B>(&ops.node);
        let [beside, dy] = arrived.take();
        let dx = match dy {
            Some(dy) => Some(saved.pull_back(dy, beside)),
            None => beside,
        };
        if let ([Some(parent)], Some(dx)) = (ops.parents, dx) {
            grads.register::<B>(parent.id, dx);
        }
    }
}
