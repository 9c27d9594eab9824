//! The products of a gated feed-forward, gated, as one operation of burn.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind, unary};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::{Shape, Tensor};
use tracing::trace_span;

use super::FrozenWeight;
use super::product::FEW_TOKENS;
use super::product_gated::Gated;
use crate::bf16::Bf16Unit;
use crate::glu::Activation;
use crate::host::{Host, filled, lends};

/// `activation(x G^T) * (x U^T)` with products in bf16, in one operation that keeps both products in bf16, where that can be
/// had: of matrices that fit, on processors that multiply bf16, for more than a few tokens.
///
/// # Shapes
/// - x: `[tokens, in]`, result: `[tokens, out]`
pub(crate) fn gated_products(
    x: &Tensor<2>,
    [gate, up]: [&FrozenWeight; 2],
    activation: Activation,
) -> Option<Tensor<2>> {
    let [tokens, width] = x.dims();
    let fit = gate.shape() == up.shape() && gate.shape()[1] == width;
    let unit = Bf16Unit::detect().filter(|_| fit && tokens > FEW_TOKENS && lends(x))?;
    let layers = GatedLayers { gate: gate.clone(), up: up.clone(), activation, unit };
    Some(Tensor::from_dispatch(Dispatch::gated_products(x.clone().into_dispatch(), layers)))
}

/// The layers, and what multiplies them.
#[derive(Debug, Clone)]
pub struct GatedLayers {
    gate: FrozenWeight,
    up: FrozenWeight,
    activation: Activation,
    unit: Bf16Unit,
}

/// The operation, for backends that lend their numbers.
#[backend_extension(Flex: cfg(feature = "flex"), LibTorch: cfg(feature = "tch"), Autodiff)]
pub trait GatedProducts: Backend {
    /// See [`gated_products`].
    fn gated_products(x: FloatTensor<Self>, layers: GatedLayers) -> FloatTensor<Self>;
}

impl<B: Host> GatedProducts for B {
    fn gated_products(x: FloatTensor<Self>, layers: GatedLayers) -> FloatTensor<Self> {
        layers.forward::<B>(x, false).0
    }
}

impl<B: Host, C: CheckpointStrategy> GatedProducts for Autodiff<B, C> {
    fn gated_products(x: FloatTensor<Self>, layers: GatedLayers) -> FloatTensor<Self> {
        match Recorded.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (y, kept) = layers.forward::<B>(x.into_primitive(), true);
                prep.finish((layers, Arc::new(kept)), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::gated_products(x.into_primitive(), layers)),
        }
    }
}

impl GatedLayers {
    fn matrices(&self) -> Gated<'_> {
        Gated { gate: self.gate.on_host(), up: self.up.on_host(), activation: self.activation }
    }

    /// The result, and both products where they are `wanted`.
    fn forward<B: Host>(&self, x: FloatTensor<B>, wanted: bool) -> (FloatTensor<B>, Vec<u16>) {
        let _product = trace_span!("product").entered();
        let (x, matrices) = (B::contiguous(x), self.matrices());
        let (tokens, [rows, _]) = (x.shape()[0], matrices.gate.shape());
        B::write(Shape::new([tokens, rows]), &x.device(), |y| {
            let x = B::numbers(&x);
            if !wanted {
                matrices.forward(self.unit, x, y, None);
                return Vec::new();
            }
            filled(tokens * matrices.kept_a_token(), |kept| matrices.forward(self.unit, x, y, Some(kept))).0
        })
    }

    fn backward<B: Host>(&self, dy: FloatTensor<B>, kept: &[u16]) -> FloatTensor<B> {
        let _product = trace_span!("product").entered();
        let (dy, matrices) = (B::contiguous(dy), self.matrices());
        let shape = Shape::new([dy.shape()[0], matrices.gate.shape()[1]]);
        B::write(shape, &dy.device(), |dx| matrices.backward(self.unit, kept, B::numbers(&dy), dx)).0
    }
}

/// The products in an autodiff graph.
#[derive(Debug)]
struct Recorded;

impl<B: Host> Backward<B, 1> for Recorded {
    type State = (GatedLayers, Arc<Vec<u16>>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (layers, kept) = ops.state;
        unary::<B, _>(ops.parents, ops.node, grads, |dy| layers.backward::<B>(dy, &kept));
    }
}
