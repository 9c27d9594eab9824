//! The stream that blocks read and add to. burn adds tensors on one core, and autodiff adds two gradients at a time; here
//! all cores do, and a value's gradients from all its readers are summed in one pass.

use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, backend_extension};
use burn::tensor::Tensor;

use crate::host::{Host, Loops, has_loops};

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

/// `x` for each of `N` readers. All of them have to be part of what gradients come from: `x` gets its own when the last of
/// theirs is there.
pub fn fan_out<const N: usize>(x: Tensor<2>) -> [Tensor<2>; N] {
    if !has_loops(&x) || N < 2 {
        return std::array::from_fn(|_| x.clone());
    }
    let readers = Arc::new(Readers { gradients: Mutex::new((0..N).map(|_| None).collect()) });
    let x = x.into_dispatch();
    std::array::from_fn(|reader| {
        Tensor::from_dispatch(Dispatch::read(x.clone(), Arc::clone(&readers), reader))
    })
}

/// What came back from the readers of a value, each a float tensor of its backend.
#[derive(Debug)]
pub struct Readers {
    gradients: Mutex<Vec<Option<Box<dyn Any + Send>>>>,
}

impl Readers {
    /// Takes a reader's gradient; all of them, in the order of the readers, when it is the last.
    fn arrived<T: Send + 'static>(&self, reader: usize, gradient: T) -> Option<Vec<T>> {
        let mut gradients = self.gradients.lock().unwrap_or_else(PoisonError::into_inner);
        gradients[reader] = Some(Box::new(gradient));
        if gradients.iter().any(Option::is_none) {
            return None;
        }
        let all =
            gradients.iter_mut().filter_map(Option::take).filter_map(|gradient| gradient.downcast().ok());
        Some(all.map(|gradient| *gradient).collect())
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        let gradients = self.gradients.get_mut().unwrap_or_else(PoisonError::into_inner);
        let waiting = gradients.iter().any(Option::is_some);
        debug_assert!(!waiting, "a reader outside the graph: a gradient is lost");
    }
}

/// The operations, for backends with loops of our own.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    LibTorch: cfg(feature = "tch"),
    Cube: cfg(feature = "cube"),
    Autodiff,
)]
pub trait Residual: Backend {
    /// See [`residual()`].
    fn residual(x: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self>;

    /// `x`, for one of its readers.
    fn read(x: FloatTensor<Self>, readers: Arc<Readers>, reader: usize) -> FloatTensor<Self>;
}

/// The sum of tensors of one shape.
trait ResidualLoops: Loops {
    fn sum(first: FloatTensor<Self>, others: Vec<FloatTensor<Self>>) -> FloatTensor<Self>;
}

impl<B: Host> ResidualLoops for B {
    fn sum(first: FloatTensor<Self>, others: Vec<FloatTensor<Self>>) -> FloatTensor<Self> {
        let others: Vec<_> = others.into_iter().map(B::contiguous).collect();
        let others: Vec<&[f32]> = others.iter().map(B::numbers).collect();
        B::rewrite(first, |sum| {
            assert!(others.iter().all(|other| other.len() == sum.len()), "summands of one shape");
            sum.add(&others);
        })
        .0
    }
}

#[cfg(feature = "cube")]
impl ResidualLoops for burn::backend::Cube {
    fn sum(first: FloatTensor<Self>, others: Vec<FloatTensor<Self>>) -> FloatTensor<Self> {
        others.into_iter().fold(first, <Self as burn::backend::ops::FloatTensorOps<Self>>::float_add)
    }
}

impl<B: ResidualLoops> Residual for B {
    fn residual(x: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self> {
        B::sum(y, vec![x])
    }

    fn read(x: FloatTensor<Self>, _: Arc<Readers>, _: usize) -> FloatTensor<Self> {
        x
    }
}

impl<B: ResidualLoops, C: CheckpointStrategy> Residual for Autodiff<B, C> {
    fn residual(x: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self> {
        let operation = Sum.prepare::<C>([x.node(), y.node()]).compute_bound().stateful();
        let sum = B::sum(y.into_primitive(), vec![x.into_primitive()]);
        match operation {
            OpsKind::Tracked(prep) => prep.finish((), sum),
            OpsKind::UnTracked(prep) => prep.finish(sum),
        }
    }

    fn read(x: FloatTensor<Self>, readers: Arc<Readers>, reader: usize) -> FloatTensor<Self> {
        match Read.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((readers, reader), x.into_primitive()),
            OpsKind::UnTracked(prep) => prep.finish(x.into_primitive()),
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

/// A value that a reader was given, in an autodiff graph.
#[derive(Debug)]
struct Read;

impl<B: ResidualLoops> Backward<B, 1> for Read {
    type State = (Arc<Readers>, usize);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (readers, reader) = ops.state;
        let gradient = grads.consume::<B>(&ops.node);
        let [Some(parent)] = ops.parents else { return };
        if let Some(mut all) = readers.arrived(reader, gradient) {
            let first = all.remove(0);
            grads.register::<B>(parent.id, B::sum(first, all));
        }
    }
}
