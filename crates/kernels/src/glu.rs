// Loops have to end up inside the functions of `wide` that are compiled for wider vectors.
#![allow(clippy::inline_always)]

#[cfg(feature = "cube")]
mod card;
mod gates;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, backend_extension};
use burn::tensor::Tensor;

use crate::host::{Host, Loops, has_loops};
use crate::plain;

/// What a gate becomes before it multiplies. The names are those of `hidden_act`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x * sigmoid(x)`
    Silu,
    /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`, near `x * Phi(x)`
    /// (Hendrycks and Gimpel 2016, <https://arxiv.org/abs/1606.08415>).
    GeluTanh,
}

/// The gated unit of a feed-forward, `activation(gate) * up`: `SwiGLU` or `GeGLU`
/// (Shazeer 2020, <https://arxiv.org/abs/2002.05202>).
///
/// # Shapes
/// - gate, up and result: `[tokens, intermediate]`
///
/// # Panics
/// Where the shapes do not fit.
pub fn glu(gate: Tensor<2>, up: Tensor<2>, activation: Activation) -> Tensor<2> {
    if !has_loops(&gate) {
        return plain::glu(gate, up, activation);
    }
    Tensor::from_dispatch(Dispatch::glu(gate.into_dispatch(), up.into_dispatch(), activation))
}

/// The operation, for backends with loops of our own.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    LibTorch: cfg(feature = "tch"),
    Cube: cfg(feature = "cube"),
    Autodiff,
)]
pub trait Glu: Backend {
    /// See [`glu`].
    fn glu(gate: FloatTensor<Self>, up: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self>;
}

impl<B: Host> Glu for B {
    fn glu(gate: FloatTensor<Self>, up: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self> {
        let up = B::contiguous(up);
        B::rewrite(gate, |gate| gates::forward(gate, B::numbers(&up), activation)).0
    }
}

/// The loops of the way back.
trait GluLoops: Glu + Loops {
    /// The gradients at `gate` and `up`, whose numbers are in order.
    fn backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        activation: Activation,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

impl<B: Host> GluLoops for B {
    fn backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        activation: Activation,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let dy = B::contiguous(dy);
        let (gate, (up, ())) = B::rewrite(gate, |gate| {
            B::rewrite(up, |up| gates::backward(gate, up, B::numbers(&dy), activation))
        });
        (gate, up)
    }
}

impl<B: GluLoops, C: CheckpointStrategy> Glu for Autodiff<B, C> {
    fn glu(gate: FloatTensor<Self>, up: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self> {
        let operation = Recorded.prepare::<C>([gate.node(), up.node()]).compute_bound().stateful();
        let (gate, up) = (gate.into_primitive(), up.into_primitive());
        match operation {
            OpsKind::Tracked(prep) => {
                let (gate, up) = (B::contiguous(gate), B::contiguous(up));
                let y = B::glu(gate.clone(), up.clone(), activation);
                prep.finish((gate, up, activation), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::glu(gate, up, activation)),
        }
    }
}

/// The gated unit in an autodiff graph.
#[derive(Debug)]
struct Recorded;

impl<B: GluLoops> Backward<B, 2> for Recorded {
    /// The gate, what it gates, and how.
    type State = (FloatTensor<B>, FloatTensor<B>, Activation);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (gate, up, activation) = ops.state;
        let dy = grads.consume::<B>(&ops.node);
        let (gate, up) = <B as GluLoops>::backward(gate, up, dy, activation);
        for (parent, gradient) in ops.parents.into_iter().zip([gate, up]) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}
