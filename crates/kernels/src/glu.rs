// Loops have to end up inside the functions of `wide` that are compiled for wider vectors.
#![allow(clippy::inline_always)]

#[cfg(feature = "cube")]
mod card;
pub(crate) mod gates;

use std::fmt::Debug;
use std::sync::Arc;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::Tensor;

use crate::frozen::Precision;
use crate::host::{Host, Loops, filled, has_loops};
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
/// (Shazeer 2020, <https://arxiv.org/abs/2002.05202>). What the way back needs is kept as `kept` says, where the numbers lie
/// in this machine's memory, which is to be what products are rounded to.
///
/// # Shapes
/// - gate, up and result: `[tokens, intermediate]`
///
/// # Panics
/// Where the shapes do not fit.
pub fn glu(gate: Tensor<2>, up: Tensor<2>, activation: Activation, kept: Precision) -> Tensor<2> {
    if !has_loops(&gate) {
        return plain::glu(gate, up, activation);
    }
    let halves = kept.is_bf16_here();
    Tensor::from_dispatch(Dispatch::glu(gate.into_dispatch(), up.into_dispatch(), activation, halves))
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
    fn glu(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        activation: Activation,
        halves: bool,
    ) -> FloatTensor<Self>;
}

impl<B: Host> Glu for B {
    fn glu(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        activation: Activation,
        _: bool,
    ) -> FloatTensor<Self> {
        let up = B::contiguous(up);
        B::rewrite(gate, |gate| gates::forward(gate, B::numbers(&up), activation)).0
    }
}

/// The loops, with what the way back needs.
trait GluLoops: Glu + Loops {
    /// The gates and what they gate.
    type Kept: Clone + Debug + Send + 'static;

    /// [`Glu::glu`], and what is kept of it: in bf16 where `halves` are wanted and can be had.
    fn forward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        activation: Activation,
        halves: bool,
    ) -> (FloatTensor<Self>, Self::Kept);

    /// The gradients at `gate` and `up`.
    fn backward(
        kept: Self::Kept,
        dy: FloatTensor<Self>,
        activation: Activation,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

/// What a host keeps.
#[derive(Debug, Clone)]
enum Kept<T> {
    Whole(T, T),
    /// In bf16.
    Halves(Arc<Vec<u16>>),
}

impl<B: Host> GluLoops for B {
    type Kept = Kept<FloatTensor<Self>>;

    fn forward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        activation: Activation,
        halves: bool,
    ) -> (FloatTensor<Self>, Self::Kept) {
        let up = B::contiguous(up);
        if !halves {
            let gate = B::contiguous(gate);
            return (B::glu(gate.clone(), up.clone(), activation, halves), Kept::Whole(gate, up));
        }
        let (y, kept) = B::rewrite(gate, |gate| {
            let up = B::numbers(&up);
            filled(gates::kept_of(up.len()), |kept| gates::forward_kept(gate, up, kept, activation)).0
        });
        (y, Kept::Halves(Arc::new(kept)))
    }

    fn backward(
        kept: Self::Kept,
        dy: FloatTensor<Self>,
        activation: Activation,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        match kept {
            Kept::Whole(gate, up) => {
                let dy = B::contiguous(dy);
                let (gate, (up, ())) = B::rewrite(gate, |gate| {
                    B::rewrite(up, |up| gates::backward(gate, up, B::numbers(&dy), activation))
                });
                (gate, up)
            }
            Kept::Halves(kept) => {
                let (shape, device) = (dy.shape(), dy.device());
                let (up, (gate, ())) = B::rewrite(dy, |dy| {
                    B::write(shape, &device, |gate| gates::backward_kept(&kept, dy, gate, activation))
                });
                (gate, up)
            }
        }
    }
}

impl<B: GluLoops, C: CheckpointStrategy> Glu for Autodiff<B, C> {
    fn glu(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        activation: Activation,
        halves: bool,
    ) -> FloatTensor<Self> {
        let operation = Recorded.prepare::<C>([gate.node(), up.node()]).compute_bound().stateful();
        let (gate, up) = (gate.into_primitive(), up.into_primitive());
        match operation {
            OpsKind::Tracked(prep) => {
                let (y, kept) = <B as GluLoops>::forward(gate, up, activation, halves);
                prep.finish((kept, activation), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::glu(gate, up, activation, halves)),
        }
    }
}

/// The gated unit in an autodiff graph.
#[derive(Debug)]
struct Recorded;

impl<B: GluLoops> Backward<B, 2> for Recorded {
    type State = (B::Kept, Activation);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (kept, activation) = ops.state;
        let dy = grads.consume::<B>(&ops.node);
        let (gate, up) = <B as GluLoops>::backward(kept, dy, activation);
        for (parent, gradient) in ops.parents.into_iter().zip([gate, up]) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}
