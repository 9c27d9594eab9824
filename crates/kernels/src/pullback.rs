use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients as Recordings;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind, unary};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::{Gradients, Shape, Tensor};

use crate::host::Host;

/// A value that a gradient is wanted for: a leaf of burn's autodiff graph.
pub trait Tracked {
    /// The same values as a leaf that retains its gradient.
    #[must_use]
    fn tracked(self) -> Self;
}

impl<const D: usize> Tracked for Tensor<D> {
    fn tracked(self) -> Self {
        self.autodiff().require_grad()
    }
}

/// The vector-Jacobian product of whatever graph ends in `output`: carries `gradient`, the
/// gradient of the loss at `output`, back to the graph's leaves.
///
/// burn's `backward` starts from a scalar with gradient one: here from a zero that hands
/// `gradient` on as its own.
///
/// # Panics
/// Where the shapes differ.
pub fn pull_back<const D: usize>(output: &Tensor<D>, gradient: Tensor<D>) -> Gradients {
    assert_eq!(output.dims(), gradient.dims(), "a gradient of the output's shape");
    let (output, gradient) = (output.clone().into_dispatch(), gradient.autodiff().into_dispatch());
    Tensor::<1>::from_dispatch(Dispatch::start(output, gradient)).backward()
}

/// The operation, for every backend.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    LibTorch: cfg(feature = "tch"),
    Cube: cfg(feature = "cube"),
    Autodiff,
)]
pub trait Start: Backend {
    /// A zero, `[1]`, whose gradient at `output` is `gradient`.
    fn start(output: FloatTensor<Self>, gradient: FloatTensor<Self>) -> FloatTensor<Self>;
}

impl<B: Host> Start for B {
    fn start(output: FloatTensor<Self>, _: FloatTensor<Self>) -> FloatTensor<Self> {
        zero::<B>(&output)
    }
}

#[cfg(feature = "cube")]
impl Start for burn::backend::Cube {
    fn start(output: FloatTensor<Self>, _: FloatTensor<Self>) -> FloatTensor<Self> {
        zero::<Self>(&output)
    }
}

fn zero<B: Backend>(output: &FloatTensor<B>) -> FloatTensor<B> {
    B::float_zeros(Shape::from([1]), &output.device(), output.dtype().into())
}

impl<B: Start, C: CheckpointStrategy> Start for Autodiff<B, C> {
    fn start(output: FloatTensor<Self>, gradient: FloatTensor<Self>) -> FloatTensor<Self> {
        let operation = Recorded.prepare::<C>([output.node()]).compute_bound().stateful();
        let (output, gradient) = (output.into_primitive(), gradient.into_primitive());
        let zero = B::start(output, gradient.clone());
        match operation {
            OpsKind::Tracked(prep) => prep.finish(gradient, zero),
            OpsKind::UnTracked(prep) => prep.finish(zero),
        }
    }
}

/// The start in an autodiff graph.
#[derive(Debug)]
struct Recorded;

impl<B: Backend> Backward<B, 1> for Recorded {
    /// The gradient to hand on.
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Recordings, _: &mut Checkpointer) {
        unary::<B, _>(ops.parents, ops.node, grads, |_| ops.state);
    }
}
