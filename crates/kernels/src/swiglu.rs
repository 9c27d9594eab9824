// Loops have to end up inside the functions of `wide` that are compiled for wider vectors.
#![allow(clippy::inline_always)]

mod gates;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, backend_extension};
use burn::tensor::Tensor;

use crate::host::{Host, lends};
use crate::plain;

/// The gated activation of Llama's feed-forward, `silu(gate) * up`
/// (Shazeer 2020, <https://arxiv.org/abs/2002.05202>).
///
/// # Shapes
/// - gate, up and result: `[tokens, intermediate]`
///
/// # Panics
/// Where the shapes do not fit.
pub fn swiglu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    if !lends(&gate) {
        return plain::swiglu(gate, up);
    }
    Tensor::from_dispatch(Dispatch::swiglu(gate.into_dispatch(), up.into_dispatch()))
}

/// The operation, for backends that lend their numbers.
#[backend_extension(Flex: cfg(feature = "flex"), LibTorch: cfg(feature = "tch"), Autodiff)]
pub trait Swiglu: Backend {
    /// See [`swiglu`].
    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;
}

impl<B: Host> Swiglu for B {
    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        let up = B::contiguous(up);
        B::rewrite(gate, |gate| gates::forward(gate, B::numbers(&up))).0
    }
}

impl<B: Host, C: CheckpointStrategy> Swiglu for Autodiff<B, C> {
    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        let operation = Recorded.prepare::<C>([gate.node(), up.node()]).compute_bound().stateful();
        let (gate, up) = (gate.into_primitive(), up.into_primitive());
        match operation {
            OpsKind::Tracked(prep) => {
                let (gate, up) = (B::contiguous(gate), B::contiguous(up));
                let y = B::swiglu(gate.clone(), up.clone());
                prep.finish((gate, up), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::swiglu(gate, up)),
        }
    }
}

/// The activation in an autodiff graph.
#[derive(Debug)]
struct Recorded;

impl<B: Host> Backward<B, 2> for Recorded {
    /// The gate and what it gates.
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (gate, up) = ops.state;
        let dy = B::contiguous(grads.consume::<B>(&ops.node));
        let (gate, (up, ())) =
            B::rewrite(gate, |gate| B::rewrite(up, |up| gates::backward(gate, up, B::numbers(&dy))));
        for (parent, gradient) in ops.parents.into_iter().zip([gate, up]) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}
