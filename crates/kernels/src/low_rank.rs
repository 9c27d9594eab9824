mod pair;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::Tensor;

use self::pair::Pair;
use crate::host::{Host, lends};
use crate::plain;

/// `y + scale * (x A^T) B^T`, the update of a low-rank adapter beside its frozen layer
/// (Hu et al. 2021, <https://arxiv.org/abs/2106.09685>), in one pass over `x` and `y`.
///
/// # Shapes
/// - y and result: `[tokens, out]`, x: `[tokens, in]`
/// - a: `[rank, in]`, b: `[out, rank]`
///
/// # Panics
/// Where the shapes do not fit.
pub fn add_low_rank(y: Tensor<2>, x: Tensor<2>, a: &Tensor<2>, b: &Tensor<2>, scale: f64) -> Tensor<2> {
    if ![&y, &x, a, b].into_iter().all(lends) {
        return plain::add_low_rank(y, x, a, b, scale);
    }
    let [y, x, a, b] = [y, x, a.clone(), b.clone()].map(Tensor::into_dispatch);
    Tensor::from_dispatch(Dispatch::add_low_rank(y, x, a, b, scale as f32))
}

/// The operation, for backends that lend their numbers.
#[backend_extension(Flex: cfg(feature = "flex"), LibTorch: cfg(feature = "tch"), Autodiff)]
pub trait LowRank: Backend {
    /// See [`add_low_rank`].
    fn add_low_rank(
        y: FloatTensor<Self>,
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f32,
    ) -> FloatTensor<Self>;
}

impl<B: Host> LowRank for B {
    fn add_low_rank(
        y: FloatTensor<Self>,
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f32,
    ) -> FloatTensor<Self> {
        let [x, a, b] = [x, a, b].map(B::contiguous);
        forward::<B>(y, &x, [&a, &b], scale).0
    }
}

/// Returns `scale * x A^T` too.
fn forward<B: Host>(
    y: FloatTensor<B>,
    x: &FloatTensor<B>,
    factors: [&FloatTensor<B>; 2],
    scale: f32,
) -> (FloatTensor<B>, Vec<f32>) {
    B::rewrite(y, |y| pair::<B>(factors, scale).add(y, B::numbers(x)))
}

fn pair<B: Host>([a, b]: [&FloatTensor<B>; 2], scale: f32) -> Pair<'_> {
    assert_eq!(a.shape()[0], b.shape()[1], "factors of one rank");
    Pair { a: B::numbers(a), b: B::numbers(b), rank: a.shape()[0], scale }
}

impl<B: Host, C: CheckpointStrategy> LowRank for Autodiff<B, C> {
    fn add_low_rank(
        y: FloatTensor<Self>,
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f32,
    ) -> FloatTensor<Self> {
        let nodes = [y.node(), x.node(), a.node(), b.node()];
        let operation = Recorded.prepare::<C>(nodes).compute_bound().stateful();
        let y = y.into_primitive();
        let [x, a, b] = [x, a, b].map(|factor| B::contiguous(factor.into_primitive()));
        let (y, low) = forward::<B>(y, &x, [&a, &b], scale);
        match operation {
            OpsKind::Tracked(prep) => prep.finish(Saved { x, a, b, low, scale }, y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}

/// What the backward pass needs.
#[derive(Debug, Clone)]
struct Saved<T> {
    x: T,
    a: T,
    b: T,
    /// `scale * x A^T`, `[tokens, rank]`
    low: Vec<f32>,
    scale: f32,
}

/// The update in an autodiff graph.
#[derive(Debug)]
struct Recorded;

impl<B: Host> Backward<B, 4> for Recorded {
    type State = Saved<FloatTensor<B>>;

    fn backward(self, ops: Ops<Self::State, 4>, grads: &mut Gradients, _: &mut Checkpointer) {
        let Saved { x, a, b, low, scale } = ops.state;
        let [to_y, to_x, to_a, to_b] = ops.parents;
        let dy = B::contiguous(grads.consume::<B>(&ops.node));
        let (pair, numbers) = (pair::<B>([&a, &b], scale), B::numbers(&dy));
        let dlow = pair.pull_back(numbers, low.len());
        if let Some(parent) = to_a {
            let da = B::write(a.shape(), &a.device(), |da| pair.at_a(&dlow, B::numbers(&x), da)).0;
            grads.register::<B>(parent.id, da);
        }
        if let Some(parent) = to_b {
            let db = B::write(b.shape(), &b.device(), |db| pair.at_b(numbers, &low, db)).0;
            grads.register::<B>(parent.id, db);
        }
        if let Some(parent) = to_x {
            let dx = B::write(x.shape(), &x.device(), |dx| pair.at_x(&dlow, dx)).0;
            grads.register::<B>(parent.id, dx);
        }
        if let Some(parent) = to_y {
            grads.register::<B>(parent.id, dy);
        }
    }
}
