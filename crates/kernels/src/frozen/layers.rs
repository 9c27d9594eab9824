//! Frozen layers that read one input, and the low-rank adapters beside them, as one operation of burn: the input is packed
//! once for all of them, and what they hand back to it is summed where it is computed, rather than by autodiff, two tensors
//! at a time.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
#[cfg(feature = "cube")]
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Autodiff, Backend, BackendTensor, Dispatch, DispatchAutodiffContext, DispatchTensor, DispatchTensorKind,
    ExtensionType, TensorMetadata, backend_extension,
};
use burn::tensor::{Shape, Tensor};
use tracing::trace_span;

use super::{FrozenProduct, FrozenWeight, Precision, product};
#[cfg(feature = "cube")]
use crate::direction::Direction;
use crate::host::{Host, has_loops, write_all};
use crate::low_rank::{LowRankLoops, Scaling};
use crate::outputs::{self, Arrived, nothing};

/// A frozen layer, with tensors of one kind.
#[derive(Debug, Clone)]
pub struct Layer<T> {
    /// `[out, in]`.
    pub w: FrozenWeight,
    /// What is added to it.
    pub update: Option<Update<T>>,
}

/// A low-rank adapter beside a frozen layer: it adds `scale * (dropout(x) A^T) B^T`.
#[derive(Debug, Clone)]
pub struct Update<T> {
    /// `[rank, in]`.
    pub a: T,
    /// `[out, rank]`.
    pub b: T,
    /// Scale and dropout.
    pub scaling: Scaling,
}

impl<T> Layer<T> {
    fn map<U>(self, f: impl Fn(T) -> U) -> Layer<U> {
        let Self { w, update } = self;
        let update = update.map(|Update { a, b, scaling }| Update { a: f(a), b: f(b), scaling });
        Layer { w, update }
    }

    fn factors(&self) -> Option<[&T; 2]> {
        self.update.as_ref().map(|update| [&update.a, &update.b])
    }
}

/// `x W^T` of every layer, with what its adapter adds; that of an only one is added to `onto`, if that is there. `None`
/// where the tensors lie on a device without loops of our own.
///
/// # Shapes
/// - x: `[tokens, in]`
/// - onto and each result: `[tokens, out]`, of its layer
///
/// # Panics
/// Where the shapes do not fit.
pub(crate) fn frozen_layers(
    x: &Tensor<2>,
    layers: Vec<Layer<Tensor<2>>>,
    onto: Option<&Tensor<2>>,
    precision: Precision,
) -> Option<Vec<Tensor<2>>> {
    if !layers.iter().filter_map(Layer::factors).flatten().chain([x]).chain(onto).all(has_loops) {
        return None;
    }
    for [a, b] in layers.iter().filter_map(Layer::factors) {
        assert_eq!(a.dims()[0], b.dims()[1], "factors of one rank");
    }
    let layers = layers.into_iter().map(|layer| layer.map(Tensor::into_dispatch)).collect();
    let layers = Readers { layers, onto: onto.cloned().map(Tensor::into_dispatch), precision };
    let results = Dispatch::frozen_layers(x.clone().into_dispatch(), layers);
    Some(results.into_iter().map(Tensor::from_dispatch).collect())
}

/// The layers of one operation, and what the product of an only one is added to.
#[derive(Debug, Clone)]
pub struct Readers<B: Backend> {
    layers: Vec<Layer<FloatTensor<B>>>,
    onto: Option<FloatTensor<B>>,
    /// Of all products.
    precision: Precision,
}

impl<B: Backend> Readers<B> {
    fn tensors(&self) -> impl Iterator<Item = &FloatTensor<B>> {
        self.onto.iter().chain(self.layers.iter().filter_map(Layer::factors).flatten())
    }

    fn map<C: Backend>(self, f: impl Fn(FloatTensor<B>) -> FloatTensor<C>) -> Readers<C> {
        let layers = self.layers.into_iter().map(|layer| layer.map(&f)).collect();
        Readers { layers, onto: self.onto.map(f), precision: self.precision }
    }
}

impl<B: Backend> ExtensionType<B> for Readers<B> {
    type Target = Readers<Dispatch>;

    fn map_to_dispatch<F>(self, map_kind: F, autodiff: DispatchAutodiffContext) -> Self::Target
    where
        F: Fn(BackendTensor<B>) -> DispatchTensorKind,
    {
        self.map(|tensor| DispatchTensor { kind: map_kind(BackendTensor::Float(tensor)), autodiff })
    }

    fn map_from_dispatch<F>(target: Self::Target, unwrap_kind: F) -> Self
    where
        F: Fn(DispatchTensor) -> BackendTensor<B>,
    {
        target.map(|tensor| unwrap_kind(tensor).float())
    }

    fn routing_tensor(target: &Self::Target) -> Option<&DispatchTensor> {
        target.tensors().next()
    }

    fn routing_float_tensor(target: &Self::Target) -> Option<&DispatchTensor> {
        target.tensors().next()
    }

    fn autodiff_context(target: &Self::Target) -> DispatchAutodiffContext {
        let contexts = target.tensors().map(|tensor| tensor.autodiff);
        contexts.fold(DispatchAutodiffContext::Disabled, DispatchAutodiffContext::merge)
    }
}

/// The operation, for backends with loops of our own.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    LibTorch: cfg(feature = "tch"),
    Cube: cfg(feature = "cube"),
    Autodiff,
)]
pub trait FrozenLayers: Backend {
    /// See [`frozen_layers`].
    fn frozen_layers(x: FloatTensor<Self>, #[extension_type] layers: Readers<Self>)
    -> Vec<FloatTensor<Self>>;
}

/// Products with several matrices.
pub trait Products: FrozenProduct + LowRankLoops {
    /// `x W^T` of every layer; that of an only one is added to `onto`, if that is there.
    fn products(x: &FloatTensor<Self>, layers: &Readers<Self>) -> Vec<FloatTensor<Self>>;

    /// The sum of `dy W` over layers, each with its `dy`, if there are any.
    fn sum_of_products(terms: &[Term<Self>], precision: Precision) -> Option<FloatTensor<Self>>;
}

/// A layer's weight and the gradient at its result.
pub type Term<'a, B> = (&'a FrozenWeight, FloatTensor<B>);

impl<B: Host> Products for B {
    fn products(x: &FloatTensor<Self>, layers: &Readers<Self>) -> Vec<FloatTensor<Self>> {
        let _product = trace_span!("product").entered();
        let Readers { layers, onto, precision } = layers;
        let shape = |layer: &Layer<_>| Shape::new([x.shape()[0], layer.w.shape()[0]]);
        let shapes: Vec<_> = layers.iter().map(shape).collect();
        write_all::<B>(&shapes, &x.device(), |outs| {
            let products = layers.iter().map(|layer| layer.w.on_host()).zip(outs).collect();
            product::forward(products, B::numbers(x), onto.as_ref().map(B::numbers), *precision);
        })
    }

    fn sum_of_products(terms: &[Term<Self>], precision: Precision) -> Option<FloatTensor<Self>> {
        let (first, dy) = terms.first()?;
        let _product = trace_span!("product").entered();
        let shape = Shape::new([dy.shape()[0], first.shape()[1]]);
        let terms: Vec<_> = terms.iter().map(|(w, dy)| (w.on_host(), B::numbers(dy))).collect();
        Some(B::write(shape, &dy.device(), |out| product::backward(&terms, precision, out)).0)
    }
}

#[cfg(feature = "cube")]
impl Products for burn::backend::Cube {
    fn products(x: &FloatTensor<Self>, layers: &Readers<Self>) -> Vec<FloatTensor<Self>> {
        let product = |layer: &Layer<_>| {
            let y = Self::frozen_product(x.clone(), layer.w.clone(), Direction::Forward, layers.precision);
            match &layers.onto {
                Some(onto) => <Self as FloatTensorOps<Self>>::float_add(y, onto.clone()),
                None => y,
            }
        };
        layers.layers.iter().map(product).collect()
    }

    fn sum_of_products(terms: &[Term<Self>], precision: Precision) -> Option<FloatTensor<Self>> {
        let product = |(w, dy): &Term<Self>| {
            Self::frozen_product(dy.clone(), (*w).clone(), Direction::Backward, precision)
        };
        terms.iter().map(product).reduce(<Self as FloatTensorOps<Self>>::float_add)
    }
}

/// The results, and for the way back `scale * dropout(x) A^T` of every adapter.
fn forward<B: Products>(
    x: &FloatTensor<B>,
    layers: &Readers<B>,
) -> (Vec<FloatTensor<B>>, Vec<Option<B::Numbers>>) {
    let updated =
        B::products(x, layers).into_iter().zip(&layers.layers).map(|(y, layer)| match &layer.update {
            Some(Update { a, b, scaling }) => {
                let (y, low) = <B as LowRankLoops>::forward(y, x, [a, b], *scaling);
                (y, Some(low))
            }
            None => (y, None),
        });
    updated.unzip()
}

impl<B: Products> FrozenLayers for B {
    fn frozen_layers(x: FloatTensor<Self>, layers: Readers<Self>) -> Vec<FloatTensor<Self>> {
        forward::<B>(&B::contiguous(x), &layers.map(B::contiguous)).0
    }
}

impl<B: Products, C: CheckpointStrategy> FrozenLayers for Autodiff<B, C> {
    fn frozen_layers(x: FloatTensor<Self>, layers: Readers<Self>) -> Vec<FloatTensor<Self>> {
        // How many parents an operation has is a part of its type.
        match layers.layers.len() {
            1 => record::<B, C, 1, 4>(x, layers).into(),
            2 => record::<B, C, 2, 6>(x, layers).into(),
            3 => record::<B, C, 3, 8>(x, layers).into(),
            layers => unreachable!("{layers} layers that read one input"),
        }
    }
}

/// `N` layers as a node of `P` parents: the input, what the product is added to, and two factors a layer. In the place of
/// those that are not there the input stands again, which gets nothing for it.
fn record<B: Products, C: CheckpointStrategy, const N: usize, const P: usize>(
    x: FloatTensor<Autodiff<B, C>>,
    layers: Readers<Autodiff<B, C>>,
) -> [FloatTensor<Autodiff<B, C>>; N] {
    let factors = layers.layers.iter().map(|layer| layer.factors().map_or([None; 2], |pair| pair.map(Some)));
    let others: Vec<_> = [layers.onto.as_ref()].into_iter().chain(factors.flatten()).collect();
    let parents: [_; P] = std::array::from_fn(|parent| match parent {
        0 => x.node(),
        _ => others[parent - 1].unwrap_or(&x).node(),
    });
    let operation = Recorded::<N>.prepare::<C>(parents).compute_bound().stateful();
    let x = B::contiguous(x.into_primitive());
    let layers: Readers<B> = layers.map(|tensor| B::contiguous(tensor.into_primitive()));
    let (results, low) = forward::<B>(&x, &layers);
    let (arrived, nothing) = (Arrived::none(), nothing::<B>(&x.device()));
    let node = match operation {
        OpsKind::Tracked(prep) => {
            let (onto, x) = (layers.onto.is_some(), low.iter().any(Option::is_some).then_some(x));
            let Readers { layers, precision, .. } = layers;
            prep.finish(Saved { x, layers, low, onto, precision, arrived: arrived.clone() }, nothing)
        }
        OpsKind::UnTracked(prep) => prep.finish(nothing),
    };
    let results = results.try_into().unwrap_or_else(|_| unreachable!("a result for every layer"));
    outputs::results::<B, C, N>(&node, &arrived, results)
}

/// What the backward pass needs.
#[derive(Debug, Clone)]
struct Saved<B: Products, const N: usize> {
    /// The input, where an adapter reads it.
    x: Option<FloatTensor<B>>,
    layers: Vec<Layer<FloatTensor<B>>>,
    /// `scale * dropout(x) A^T` of every adapter.
    low: Vec<Option<B::Numbers>>,
    /// Whether the product was added to something.
    onto: bool,
    precision: Precision,
    arrived: Arrived<FloatTensor<B>, N>,
}

/// The layers with their adapters in an autodiff graph.
#[derive(Debug)]
struct Recorded<const N: usize>;

impl<B: Products, const N: usize, const P: usize> Backward<B, P> for Recorded<N> {
    type State = Saved<B, N>;

    fn backward(self, ops: Ops<Self::State, P>, grads: &mut Gradients, _: &mut Checkpointer) {
        let Saved { x, layers, low, onto, precision, arrived } = ops.state;
        grads.consume::<B>(&ops.node);
        let dys = arrived.take().map(|dy| dy.map(B::contiguous));
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let mut gradients = [const { None }; P];
        gradients[1] = dys[0].clone().filter(|_| onto);
        let terms = layers.iter().zip(&dys).filter_map(|(layer, dy)| Some((&layer.w, dy.clone()?)));
        let mut dx = wanted[0].then(|| B::sum_of_products(&terms.collect::<Vec<_>>(), precision)).flatten();
        for (i, ((layer, low), dy)) in layers.iter().zip(&low).zip(&dys).enumerate() {
            let (Some(x), Some(dy), Some(low), Some(update)) = (&x, dy, low, &layer.update) else { continue };
            let factors = [2 + 2 * i, 3 + 2 * i];
            let wanted = [wanted[0], wanted[factors[0]], wanted[factors[1]]];
            let Update { a, b, scaling } = update;
            let [at_x, at_factors @ ..] =
                <B as LowRankLoops>::backward(dy, x, dx, [a, b], low, *scaling, wanted);
            dx = at_x;
            for (factor, gradient) in factors.into_iter().zip(at_factors) {
                gradients[factor] = gradient;
            }
        }
        gradients[0] = dx;
        for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}
