//! A gated feed-forward of the frozen base as one operation of burn.

use std::mem::MaybeUninit;
use std::sync::Arc;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::Tensor;
use tracing::trace_span;

use super::FrozenWeight;
use super::product::FEW_TOKENS;
use super::product_feed_forward::FeedForward;
use crate::bf16::Bf16Unit;
use crate::glu::Activation;
use crate::host::{Host, filled, lends};

/// `(activation(x G^T) * (x U^T)) D^T`, added to `onto` if that is there, with products in bf16, in one operation that keeps
/// what is gated in bf16, where that can be had: of matrices that fit, on processors that multiply bf16, for more than a few
/// tokens. What is not to be `read` is not computed: its numbers may be any, its gradients are what they should be.
///
/// # Shapes
/// - x, onto and result: `[tokens, hidden]`
pub(crate) fn feed_forward(
    x: &Tensor<2>,
    onto: Option<&Tensor<2>>,
    [gate, up, down]: [&FrozenWeight; 3],
    activation: Activation,
    read: bool,
) -> Option<Tensor<2>> {
    let [tokens, hidden] = x.dims();
    let [inner, width] = gate.shape();
    let fit = width == hidden && up.shape() == gate.shape() && down.shape() == [hidden, inner];
    let lent = fit && tokens > FEW_TOKENS && lends(x) && onto.is_none_or(lends);
    let unit = Bf16Unit::detect().filter(|_| lent)?;
    let [gate, up, down] = [gate, up, down].map(FrozenWeight::clone);
    let layers = GatedLayers { gate, up, down, activation, unit, added: onto.is_some(), read };
    let [x, onto] = [x, onto.unwrap_or(x)].map(|tensor| tensor.clone().into_dispatch());
    Some(Tensor::from_dispatch(Dispatch::feed_forward(x, onto, layers)))
}

/// The layers, and what is wanted of them.
#[derive(Debug, Clone)]
pub struct GatedLayers {
    gate: FrozenWeight,
    up: FrozenWeight,
    down: FrozenWeight,
    activation: Activation,
    unit: Bf16Unit,
    /// Whether the product is added to something; where it is not, the input stands in that place, and gets nothing for it.
    added: bool,
    read: bool,
}

/// The operation, for backends that lend their numbers.
#[backend_extension(Flex: cfg(feature = "flex"), LibTorch: cfg(feature = "tch"), Autodiff)]
pub trait GatedFeedForward: Backend {
    /// See [`feed_forward`].
    fn feed_forward(x: FloatTensor<Self>, onto: FloatTensor<Self>, layers: GatedLayers) -> FloatTensor<Self>;
}

impl<B: Host> GatedFeedForward for B {
    fn feed_forward(x: FloatTensor<Self>, onto: FloatTensor<Self>, layers: GatedLayers) -> FloatTensor<Self> {
        layers.forward::<B>(x, onto, false).0
    }
}

impl<B: Host, C: CheckpointStrategy> GatedFeedForward for Autodiff<B, C> {
    fn feed_forward(x: FloatTensor<Self>, onto: FloatTensor<Self>, layers: GatedLayers) -> FloatTensor<Self> {
        let operation = Recorded.prepare::<C>([x.node(), onto.node()]).compute_bound().stateful();
        let (x, onto) = (x.into_primitive(), onto.into_primitive());
        match operation {
            OpsKind::Tracked(prep) => {
                let (y, kept) = layers.forward::<B>(x, onto, true);
                prep.finish((layers, Arc::new(kept)), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::feed_forward(x, onto, layers)),
        }
    }
}

impl GatedLayers {
    fn on_host(&self) -> FeedForward<'_> {
        let [gate, up, down] = [&self.gate, &self.up, &self.down].map(FrozenWeight::on_host);
        FeedForward { gate, up, down, activation: self.activation }
    }

    /// The result, and what the way back needs where that is `wanted`.
    fn forward<B: Host>(
        &self,
        x: FloatTensor<B>,
        onto: FloatTensor<B>,
        wanted: bool,
    ) -> (FloatTensor<B>, Vec<u16>) {
        let _product = trace_span!("product").entered();
        let (x, onto) = (B::contiguous(x), B::contiguous(onto));
        let numbers = || (B::numbers(&x), self.added.then(|| B::numbers(&onto)));
        if self.read {
            return B::write(x.shape(), &x.device(), |y| self.run(numbers(), Some(y), wanted));
        }
        let kept = self.run(numbers(), None, wanted);
        (onto, kept)
    }

    /// Writes the result to `y`, if that is there, and tells what the way back needs where that is `wanted`.
    fn run(
        &self,
        (x, onto): (&[f32], Option<&[f32]>),
        y: Option<&mut [MaybeUninit<f32>]>,
        wanted: bool,
    ) -> Vec<u16> {
        let layers = self.on_host();
        let kept = if wanted { layers.kept_of(x.len() / self.gate.shape()[1]) } else { 0 };
        filled(kept, |kept| layers.forward(self.unit, x, onto, y, wanted.then_some(kept))).0
    }

    fn backward<B: Host>(&self, dy: &FloatTensor<B>, kept: &[u16]) -> FloatTensor<B> {
        let _product = trace_span!("product").entered();
        B::write(dy.shape(), &dy.device(), |dx| {
            self.on_host().backward(self.unit, kept, B::numbers(dy), dx);
        })
        .0
    }
}

/// The feed-forward in an autodiff graph.
#[derive(Debug)]
struct Recorded;

impl<B: Host> Backward<B, 2> for Recorded {
    type State = (GatedLayers, Arc<Vec<u16>>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (layers, kept) = ops.state;
        let dy = B::contiguous(grads.consume::<B>(&ops.node));
        let [x, onto] = ops.parents;
        if let Some(x) = x {
            grads.register::<B>(x.id, layers.backward::<B>(&dy, &kept));
        }
        if let Some(onto) = onto.filter(|_| layers.added) {
            grads.register::<B>(onto.id, dy);
        }
    }
}
