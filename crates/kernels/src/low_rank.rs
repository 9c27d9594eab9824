// Loops have to end up inside the functions of `wide` that are compiled for wider vectors.
#![allow(clippy::inline_always)]

#[cfg(feature = "cube")]
mod card;
mod seen;
mod thin;
mod thin_pair;
mod wide_pair;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::{Tensor, TensorData};
use tracing::trace_span;

use self::thin_pair::ThinPair;
use self::wide_pair::WidePair;
use crate::dropout::Mask;
use crate::host::{Host, Loops, has_loops};
use crate::plain;
use crate::rewritten::Rewritten;

/// What an adapter's product is multiplied by, and what of its input is dropped.
#[derive(Debug, Clone, Copy)]
pub struct Scaling {
    /// The factor.
    pub scale: f64,
    /// Dropout in front of the adapter.
    pub mask: Option<Mask>,
}

impl From<f64> for Scaling {
    fn from(scale: f64) -> Self {
        Self { scale, mask: None }
    }
}

/// `y + scale * (dropout(x) A^T) B^T`, the update of a low-rank adapter beside its frozen layer
/// (Hu et al. 2021, <https://arxiv.org/abs/2106.09685>), in one pass over `x` and `y`.
///
/// # Shapes
/// - y and result: `[tokens, out]`, x: `[tokens, in]`
/// - a: `[rank, in]`, b: `[out, rank]`
///
/// # Panics
/// Where the shapes do not fit.
pub fn add_low_rank(
    y: Tensor<2>,
    x: Tensor<2>,
    a: &Tensor<2>,
    b: &Tensor<2>,
    scaling: impl Into<Scaling>,
) -> Tensor<2> {
    let scaling = scaling.into();
    assert_eq!(a.dims()[0], b.dims()[1], "factors of one rank");
    if ![&y, &x, a, b].into_iter().all(has_loops) {
        return plain::add_low_rank(y, x, a, b, scaling);
    }
    let [y, x, a, b] = [y, x, a.clone(), b.clone()].map(Tensor::into_dispatch);
    Tensor::from_dispatch(Dispatch::add_low_rank(y, x, a, b, scaling))
}

/// The operation, for backends with loops of our own.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    LibTorch: cfg(feature = "tch"),
    Cube: cfg(feature = "cube"),
    Autodiff,
)]
pub trait LowRank: Backend {
    /// See [`add_low_rank`].
    fn add_low_rank(
        y: FloatTensor<Self>,
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scaling: Scaling,
    ) -> FloatTensor<Self>;
}

/// The loops, over tensors whose numbers are in order.
pub(crate) trait LowRankLoops: Loops {
    /// Returns `scale * dropout(x) A^T`, `[tokens, rank]` or with zeros behind each token's, too.
    fn forward(
        y: FloatTensor<Self>,
        x: &FloatTensor<Self>,
        factors: [&FloatTensor<Self>; 2],
        scaling: Scaling,
    ) -> (FloatTensor<Self>, Self::Numbers);

    /// The gradients at `x`, `A` and `B` that are wanted; that at `x` is added to what there is of it.
    fn backward(
        dy: &FloatTensor<Self>,
        x: &FloatTensor<Self>,
        dx: Option<FloatTensor<Self>>,
        factors: [&FloatTensor<Self>; 2],
        low: &Self::Numbers,
        scaling: Scaling,
        wanted: [bool; 3],
    ) -> [Option<FloatTensor<Self>>; 3];
}

impl<B: Host> LowRankLoops for B {
    fn forward(
        y: FloatTensor<Self>,
        x: &FloatTensor<Self>,
        factors: [&FloatTensor<Self>; 2],
        scaling: Scaling,
    ) -> (FloatTensor<Self>, Vec<f32>) {
        let _adapter = trace_span!("adapter").entered();
        B::rewrite(y, |y| pair::<B>(factors, scaling).add(y, B::numbers(x)))
    }

    fn backward(
        dy: &FloatTensor<Self>,
        x: &FloatTensor<Self>,
        dx: Option<FloatTensor<Self>>,
        [a, b]: [&FloatTensor<Self>; 2],
        low: &Vec<f32>,
        scaling: Scaling,
        [to_x, to_a, to_b]: [bool; 3],
    ) -> [Option<FloatTensor<Self>>; 3] {
        let _adapter = trace_span!("adapter").entered();
        let pull_back = |dx: Option<Rewritten>| {
            pair::<B>([a, b], scaling).pull_back(B::numbers(dy), B::numbers(x), low, dx)
        };
        let (dx, [da, db]) = if to_x {
            let dx = dx.unwrap_or_else(|| B::float_zeros(x.shape(), &x.device(), x.dtype().into()));
            let (dx, factors) = B::rewrite(dx, |dx| pull_back(Some(dx)));
            (Some(dx), factors)
        } else {
            (None, pull_back(None))
        };
        let tensor = |numbers, like: &FloatTensor<Self>| {
            B::float_from_data(TensorData::new(numbers, like.shape()), &like.device())
        };
        [dx, to_a.then(|| tensor(da, a)), to_b.then(|| tensor(db, b))]
    }
}

/// Ranks up to which the products with an adapter's factors are not those of matrices.
const THIN: usize = 16;

/// The two factors of an adapter, on the host.
enum Pair<'a> {
    Thin(ThinPair),
    Wide(WidePair<'a>),
}

fn pair<B: Host>([a, b]: [&FloatTensor<B>; 2], scaling: Scaling) -> Pair<'_> {
    let rank = a.shape()[0];
    let [a, b] = [a, b].map(B::numbers);
    if rank <= THIN {
        Pair::Thin(ThinPair::new(a, b, rank, scaling))
    } else {
        Pair::Wide(WidePair::new(a, b, rank, scaling))
    }
}

impl Pair<'_> {
    /// `y += low B^T` with `low = scale * dropout(x) A^T`, which it returns, `[tokens, rank]` or with zeros behind each
    /// token's.
    ///
    /// # Panics
    /// Where the numbers of `x` and `y` are not as many rows.
    fn add(&self, y: Rewritten, x: &[f32]) -> Vec<f32> {
        match self {
            Self::Thin(pair) => pair.add(y, x),
            Self::Wide(pair) => pair.add(y, x),
        }
    }

    /// The gradients at A and B for `dy`, `[rank, in]` and `[out, rank]`, from the `low` of [`Self::add`]; that at `x` is
    /// added to `dx` where it is wanted.
    fn pull_back(&self, dy: &[f32], x: &[f32], low: &[f32], dx: Option<Rewritten>) -> [Vec<f32>; 2] {
        match self {
            Self::Thin(pair) => pair.pull_back(dy, x, low, dx),
            Self::Wide(pair) => pair.pull_back(dy, x, low, dx),
        }
    }
}

impl<B: LowRankLoops> LowRank for B {
    fn add_low_rank(
        y: FloatTensor<Self>,
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scaling: Scaling,
    ) -> FloatTensor<Self> {
        let [x, a, b] = [x, a, b].map(B::contiguous);
        B::forward(y, &x, [&a, &b], scaling).0
    }
}

impl<B: LowRankLoops, C: CheckpointStrategy> LowRank for Autodiff<B, C> {
    fn add_low_rank(
        y: FloatTensor<Self>,
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scaling: Scaling,
    ) -> FloatTensor<Self> {
        let nodes = [y.node(), x.node(), a.node(), b.node()];
        let operation = Recorded.prepare::<C>(nodes).compute_bound().stateful();
        let y = y.into_primitive();
        let [x, a, b] = [x, a, b].map(|factor| B::contiguous(factor.into_primitive()));
        let (y, low) = B::forward(y, &x, [&a, &b], scaling);
        match operation {
            OpsKind::Tracked(prep) => prep.finish(Saved { x, a, b, low, scaling }, y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}

/// What the backward pass needs.
#[derive(Debug, Clone)]
struct Saved<T, L> {
    x: T,
    a: T,
    b: T,
    /// `scale * dropout(x) A^T`, `[tokens, rank]`, or more behind each.
    low: L,
    scaling: Scaling,
}

/// The update in an autodiff graph.
#[derive(Debug)]
struct Recorded;

impl<B: LowRankLoops> Backward<B, 4> for Recorded {
    type State = Saved<FloatTensor<B>, B::Numbers>;

    fn backward(self, ops: Ops<Self::State, 4>, grads: &mut Gradients, _: &mut Checkpointer) {
        let Saved { x, a, b, low, scaling } = ops.state;
        let dy = B::contiguous(grads.consume::<B>(&ops.node));
        let wanted = [1, 2, 3].map(|i| ops.parents[i].is_some());
        let [dx, da, db] = <B as LowRankLoops>::backward(&dy, &x, None, [&a, &b], &low, scaling, wanted);
        for (parent, gradient) in ops.parents.into_iter().zip([Some(dy), dx, da, db]) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}
