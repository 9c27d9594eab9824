//! The stream that blocks add to. burn adds tensors on one core; here all cores do.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, backend_extension};
use burn::tensor::Tensor;

use crate::host::{Host, has_loops};

/// `x + y`, as it goes around a half of a block.
///
/// # Shapes
/// - x, y and result: `[tokens, hidden]`
pub fn residual(x: Tensor<2>, y: Tensor<2>) -> Tensor<2> {
    if ![&x, &y].into_iter().all(has_loops) {
        return x + y;
    }
    Tensor::from_dispatch(Dispatch::residual(x.into_dispatch(), y.into_dispatch()))
}

/// The operation, for backends with loops of our own.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    LibTorch: cfg(feature = "tch"),
    Cube: cfg(feature = "cube"),
    Autodiff,
)]
pub trait Residual: Backend {
    /// See [`residual()`].
    fn residual(x: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self>;
}

impl<B: Host> Residual for B {
    fn residual(x: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self> {
        let x = B::contiguous(x);
        B::rewrite(y, |y| {
            assert_eq!(y.len(), B::numbers(&x).len(), "summands of one shape");
            y.add(&[B::numbers(&x)]);
        })
        .0
    }
}

#[cfg(feature = "cube")]
impl Residual for burn::backend::Cube {
    fn residual(x: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self> {
        <Self as burn::backend::ops::FloatTensorOps<Self>>::float_add(x, y)
    }
}

impl<B: Residual, C: CheckpointStrategy> Residual for Autodiff<B, C> {
    fn residual(x: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self> {
        let operation = Sum.prepare::<C>([x.node(), y.node()]).compute_bound().stateful();
        let sum = B::residual(x.into_primitive(), y.into_primitive());
        match operation {
            OpsKind::Tracked(prep) => prep.finish((), sum),
            OpsKind::UnTracked(prep) => prep.finish(sum),
        }
    }
}

/// The sum in an autodiff graph.
#[derive(Debug)]
struct Sum;

impl<B: Backend> Backward<B, 2> for Sum {
    type State = ();

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        for parent in ops.parents.into_iter().flatten() {
            grads.register::<B>(parent.id, gradient.clone());
        }
    }
}
