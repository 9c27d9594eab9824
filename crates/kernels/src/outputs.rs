//! Operations of several results, in a graph whose operations have one: the operation is a node that nobody reads, and its
//! results are nodes behind it, which hand their gradients on to it.

use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{Device, FloatTensor};
use burn::backend::{Autodiff, Backend};
use burn::tensor::{FloatDType, Shape};

/// The gradients at the results of an operation that have arrived so far.
#[derive(Debug, Clone)]
pub struct Arrived<T, const N: usize>(Arc<Mutex<[Option<T>; N]>>);

impl<T, const N: usize> Arrived<T, N> {
    /// None yet.
    pub fn none() -> Self {
        Self(Arc::new(Mutex::new([const { None }; N])))
    }

    /// All of them, in the order of the results. One that nothing was made of has none.
    pub fn take(&self) -> [Option<T>; N] {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).each_mut().map(Option::take)
    }

    /// Whether this is the first.
    fn put(&self, result: usize, gradient: T) -> bool {
        let mut gradients = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let first = gradients.iter().all(Option::is_none);
        gradients[result] = Some(gradient);
        first
    }
}

/// What the node of an operation holds, which nobody reads.
pub fn nothing<B: Backend>(device: &Device<B>) -> FloatTensor<B> {
    B::float_zeros(Shape::new([1]), device, FloatDType::F32)
}

/// The `results` of the operation whose node is `operation`, which finds in `arrived` what comes back to them.
pub fn results<B: Backend, C: CheckpointStrategy, const N: usize>(
    operation: &FloatTensor<Autodiff<B, C>>,
    arrived: &Arrived<FloatTensor<B>, N>,
    results: [FloatTensor<B>; N],
) -> [FloatTensor<Autodiff<B, C>>; N] {
    let mut order = 0..N;
    results.map(|result| match Read::<N>.prepare::<C>([operation.node()]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            let place = order.next().unwrap_or_default();
            prep.finish((arrived.clone(), place, operation.primitive().clone()), result)
        }
        OpsKind::UnTracked(prep) => prep.finish(result),
    })
}

/// A result in an autodiff graph, of an operation of `N`.
#[derive(Debug)]
struct Read<const N: usize>;

impl<B: Backend, const N: usize> Backward<B, 1> for Read<N> {
    /// Where its gradient is put, as which, and what the operation's node gets.
    type State = (Arrived<FloatTensor<B>, N>, usize, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (arrived, result, nothing) = ops.state;
        let gradient = grads.consume::<B>(&ops.node);
        let [Some(operation)] = ops.parents else { return };
        if arrived.put(result, gradient) {
            grads.register::<B>(operation.id, nothing);
        }
    }
}
