//! Products with a frozen matrix as an operation of burn, with its own backward pass: all that
//! autodiff keeps of it is a reference to the matrix.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind, unary};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::{Shape, Tensor, TensorData};
use tracing::trace_span;

use super::{FrozenWeight, Precision};
use crate::direction::Direction;
use crate::host::Host;

/// `x W^T` or `x W`, with `W` where it is kept.
///
/// # Shapes
/// - x and result: `[tokens, in]` and `[tokens, out]`, whichever the direction says
pub(crate) fn frozen_product(
    x: Tensor<2>,
    w: &FrozenWeight,
    direction: Direction,
    precision: Precision,
) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::frozen_product(x.into_dispatch(), w.clone(), direction, precision))
}

/// What `x W^T` hands back to the inputs, without the product itself: the result is zeros.
///
/// # Shapes
/// - x: `[tokens, in]`, result: `[tokens, out]`
pub(crate) fn unread_product(x: Tensor<2>, w: &FrozenWeight, precision: Precision) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::unread_product(x.into_dispatch(), w.clone(), precision))
}

/// The operation, for every backend. CubeCL's cards multiply by themselves; a matrix that still lies
/// in the host's memory is sent there first. Otherwise the products run on the host's processor:
/// LibTorch's cards pay for the way there and back.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    LibTorch: cfg(feature = "tch"),
    Cube: cfg(feature = "cube"),
    Autodiff,
)]
pub trait FrozenProduct: Backend {
    /// `x W^T` or `x W`, whichever the direction says.
    fn frozen_product(
        x: FloatTensor<Self>,
        w: FrozenWeight,
        direction: Direction,
        precision: Precision,
    ) -> FloatTensor<Self>;

    /// Zeros in the place of `x W^T`, with its gradient.
    fn unread_product(x: FloatTensor<Self>, w: FrozenWeight, precision: Precision) -> FloatTensor<Self>;
}

impl<B: Host> FrozenProduct for B {
    fn frozen_product(
        x: FloatTensor<Self>,
        w: FrozenWeight,
        direction: Direction,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let _product = trace_span!("product").entered();
        let w = w.on_host();
        let device = x.device();
        let [summed, width] = w.widths(direction);
        let shape = Shape::new([x.shape()[0], width]);
        assert_eq!(x.shape()[1], summed, "rows as wide as the matrix");
        if !B::lends(&x) {
            let x = fetched::<B>(x);
            return B::float_from_data(TensorData::new(w.product(&x, direction, precision), shape), &device);
        }
        let x = B::contiguous(x);
        B::write(shape, &device, |out| w.multiply(B::numbers(&x), direction, precision, out)).0
    }

    fn unread_product(x: FloatTensor<Self>, w: FrozenWeight, _: Precision) -> FloatTensor<Self> {
        zeros::<B>(&x, &w)
    }
}

#[cfg(feature = "cube")]
impl FrozenProduct for burn::backend::Cube {
    fn frozen_product(
        x: FloatTensor<Self>,
        w: FrozenWeight,
        direction: Direction,
        precision: Precision,
    ) -> FloatTensor<Self> {
        w.on_cube(&x.device()).product(x, direction, precision)
    }

    fn unread_product(x: FloatTensor<Self>, w: FrozenWeight, _: Precision) -> FloatTensor<Self> {
        zeros::<Self>(&x, &w)
    }
}

fn zeros<B: Backend>(x: &FloatTensor<B>, w: &FrozenWeight) -> FloatTensor<B> {
    let ([rows, _], tokens) = (w.shape(), x.shape()[0]);
    B::float_zeros(Shape::new([tokens, rows]), &x.device(), x.dtype().into())
}

/// The numbers of a tensor that the host's processor cannot read where they are.
fn fetched<B: Backend>(x: FloatTensor<B>) -> Vec<f32> {
    match burn::tensor::try_read_sync(B::float_into_data(x)) {
        Some(Ok(data)) => data.convert::<f32>().try_into_vec().unwrap_or_default(),
        // Only browsers cannot wait for a device, and none of these backends is for them.
        _ => Vec::new(),
    }
}

impl<B: FrozenProduct, C: CheckpointStrategy> FrozenProduct for Autodiff<B, C> {
    fn frozen_product(
        x: FloatTensor<Self>,
        w: FrozenWeight,
        direction: Direction,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let operation = Recorded.prepare::<C>([x.node()]).compute_bound().stateful();
        let y = B::frozen_product(x.into_primitive(), w.clone(), direction, precision);
        match operation {
            OpsKind::Tracked(prep) => prep.finish((w, direction, precision), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }

    fn unread_product(x: FloatTensor<Self>, w: FrozenWeight, precision: Precision) -> FloatTensor<Self> {
        let operation = Recorded.prepare::<C>([x.node()]).compute_bound().stateful();
        let y = zeros::<B>(&x.into_primitive(), &w);
        match operation {
            OpsKind::Tracked(prep) => prep.finish((w, Direction::Forward, precision), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}

/// The product in an autodiff graph.
#[derive(Debug)]
struct Recorded;

impl<B: FrozenProduct> Backward<B, 1> for Recorded {
    type State = (FrozenWeight, Direction, Precision);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (w, direction, precision) = ops.state;
        unary::<B, _>(ops.parents, ops.node, grads, |gradient| {
            B::frozen_product(gradient, w, direction.reversed(), precision)
        });
    }
}
