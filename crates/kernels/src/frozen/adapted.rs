//! A frozen layer and the low-rank adapter beside it as one operation of burn: on the way back the adapter adds its part
//! to the layer's gradient where that lies, rather than autodiff two tensors of it.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, backend_extension};
use burn::tensor::Tensor;

use super::{FrozenProduct, FrozenWeight, Precision};
use crate::direction::Direction;
use crate::host::has_loops;
use crate::low_rank::{LowRankLoops, Scaling, add_low_rank};

/// `x W^T + scale * (dropout(x) A^T) B^T`.
///
/// # Shapes
/// - x: `[tokens, in]`, result: `[tokens, out]`
/// - a: `[rank, in]`, b: `[out, rank]`
///
/// # Panics
/// Where the shapes do not fit.
pub(crate) fn adapted_product(
    x: Tensor<2>,
    w: &FrozenWeight,
    precision: Precision,
    [a, b]: [&Tensor<2>; 2],
    scaling: Scaling,
) -> Tensor<2> {
    assert_eq!(a.dims()[0], b.dims()[1], "factors of one rank");
    if ![&x, a, b].into_iter().all(has_loops) {
        let y = super::frozen_product(x.clone(), w, Direction::Forward, precision);
        return add_low_rank(y, x, a, b, scaling);
    }
    let [x, a, b] = [x, a.clone(), b.clone()].map(Tensor::into_dispatch);
    Tensor::from_dispatch(Dispatch::adapted_product(x, w.clone(), precision, a, b, scaling))
}

/// The operation, for backends with loops of our own.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    LibTorch: cfg(feature = "tch"),
    Cube: cfg(feature = "cube"),
    Autodiff,
)]
pub trait AdaptedProduct: Backend {
    /// See [`adapted_product`].
    fn adapted_product(
        x: FloatTensor<Self>,
        w: FrozenWeight,
        precision: Precision,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scaling: Scaling,
    ) -> FloatTensor<Self>;
}

/// The product, and `scale * dropout(x) A^T` for the way back.
fn forward<B: FrozenProduct + LowRankLoops>(
    x: &FloatTensor<B>,
    w: &FrozenWeight,
    precision: Precision,
    factors: [&FloatTensor<B>; 2],
    scaling: Scaling,
) -> (FloatTensor<B>, B::Numbers) {
    let y = B::frozen_product(x.clone(), w.clone(), Direction::Forward, precision);
    <B as LowRankLoops>::forward(y, x, factors, scaling)
}

impl<B: FrozenProduct + LowRankLoops> AdaptedProduct for B {
    fn adapted_product(
        x: FloatTensor<Self>,
        w: FrozenWeight,
        precision: Precision,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scaling: Scaling,
    ) -> FloatTensor<Self> {
        let [x, a, b] = [x, a, b].map(B::contiguous);
        forward::<B>(&x, &w, precision, [&a, &b], scaling).0
    }
}

impl<B: FrozenProduct + LowRankLoops, C: CheckpointStrategy> AdaptedProduct for Autodiff<B, C> {
    fn adapted_product(
        x: FloatTensor<Self>,
        w: FrozenWeight,
        precision: Precision,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scaling: Scaling,
    ) -> FloatTensor<Self> {
        let nodes = [x.node(), a.node(), b.node()];
        let operation = Recorded.prepare::<C>(nodes).compute_bound().stateful();
        let [x, a, b] = [x, a, b].map(|tensor| B::contiguous(tensor.into_primitive()));
        let (y, low) = forward::<B>(&x, &w, precision, [&a, &b], scaling);
        match operation {
            OpsKind::Tracked(prep) => prep.finish(Saved { x, w, precision, a, b, low, scaling }, y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}

/// What the backward pass needs.
#[derive(Debug, Clone)]
struct Saved<T, L> {
    x: T,
    w: FrozenWeight,
    precision: Precision,
    a: T,
    b: T,
    low: L,
    scaling: Scaling,
}

/// The layer with its adapter in an autodiff graph.
#[derive(Debug)]
struct Recorded;

impl<B: FrozenProduct + LowRankLoops> Backward<B, 3> for Recorded {
    type State = Saved<FloatTensor<B>, B::Numbers>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let Saved { x, w, precision, a, b, low, scaling } = ops.state;
        let dy = B::contiguous(grads.consume::<B>(&ops.node));
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let dx = wanted[0].then(|| B::frozen_product(dy.clone(), w, Direction::Backward, precision));
        let gradients = <B as LowRankLoops>::backward(&dy, &x, dx, [&a, &b], &low, scaling, wanted);
        for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}
