//! Frozen layers that read one input, and the low-rank adapters beside them, as one operation of burn: the input is packed
//! once for all of them, and what they hand back to it is summed where it is computed, rather than by autodiff, two tensors
//! at a time.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Autodiff, Backend, BackendTensor, Dispatch, DispatchAutodiffContext, DispatchTensor, DispatchTensorKind,
    ExtensionType, TensorMetadata, backend_extension,
};
use burn::tensor::{Shape, Tensor};
use tracing::trace_span;

use super::{FrozenProduct, FrozenWeight, Precision, frozen_product, product};
use crate::direction::Direction;
use crate::host::{Host, has_loops, write_all};
use crate::low_rank::{LowRankLoops, Scaling, add_low_rank};
use crate::outputs::{self, Arrived, nothing};
use crate::residual::residual;

/// A frozen layer, with tensors of one kind.
#[derive(Debug, Clone)]
pub struct Layer<T> {
    /// `[out, in]`.
    pub w: FrozenWeight,
    /// Of its product.
    pub precision: Precision,
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
        let Self { w, precision, update } = self;
        let update = update.map(|Update { a, b, scaling }| Update { a: f(a), b: f(b), scaling });
        Layer { w, precision, update }
    }

    fn factors(&self) -> Option<[&T; 2]> {
        self.update.as_ref().map(|update| [&update.a, &update.b])
    }
}

/// `x W^T` of every layer, with what its adapter adds; that of an only one is added to `onto`, if that is there.
///
/// # Shapes
/// - x: `[tokens, in]`
/// - onto and each result: `[tokens, out]`, of its layer
///
/// # Panics
/// Where the shapes do not fit.
pub(crate) fn frozen_layers(
    x: Tensor<2>,
    layers: Vec<Layer<Tensor<2>>>,
    onto: Option<Tensor<2>>,
) -> Vec<Tensor<2>> {
    for [a, b] in layers.iter().filter_map(Layer::factors) {
        assert_eq!(a.dims()[0], b.dims()[1], "factors of one rank");
    }
    let factors = layers.iter().filter_map(Layer::factors).flatten();
    if !factors.chain([&x]).chain(&onto).all(has_loops) {
        let alone = |layer: Layer<Tensor<2>>| {
            let y = frozen_product(x.clone(), &layer.w, Direction::Forward, layer.precision);
            updated(y, x.clone(), layer.update, onto.clone())
        };
        return layers.into_iter().map(alone).collect();
    }
    let layers = layers.into_iter().map(|layer| layer.map(Tensor::into_dispatch)).collect();
    let layers = Layers { layers, onto: onto.map(Tensor::into_dispatch) };
    Dispatch::frozen_layers(x.into_dispatch(), layers).into_iter().map(Tensor::from_dispatch).collect()
}

/// A layer's product `y` with what its adapter adds, added to `onto`: by an operation each.
pub(crate) fn updated(
    y: Tensor<2>,
    x: Tensor<2>,
    update: Option<Update<Tensor<2>>>,
    onto: Option<Tensor<2>>,
) -> Tensor<2> {
    let y = match onto {
        Some(onto) => residual(onto, y),
        None => y,
    };
    match update {
        Some(Update { a, b, scaling }) => add_low_rank(y, x, &a, &b, scaling),
        None => y,
    }
}

/// The layers of one operation, and what the product of an only one is added to.
#[derive(Debug, Clone)]
pub struct Layers<B: Backend> {
    layers: Vec<Layer<FloatTensor<B>>>,
    onto: Option<FloatTensor<B>>,
}

impl<B: Backend> Layers<B> {
    fn tensors(&self) -> impl Iterator<Item = &FloatTensor<B>> {
        self.onto.iter().chain(self.layers.iter().filter_map(Layer::factors).flatten())
    }

    fn map<C: Backend>(self, f: impl Fn(FloatTensor<B>) -> FloatTensor<C>) -> Layers<C> {
        let layers = self.layers.into_iter().map(|layer| layer.map(&f)).collect();
        Layers { layers, onto: self.onto.map(f) }
    }
}

impl<B: Backend> ExtensionType<B> for Layers<B> {
    type Target = Layers<Dispatch>;

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
    fn frozen_layers(x: FloatTensor<Self>, #[extension_type] layers: Layers<Self>) -> Vec<FloatTensor<Self>>;
}

/// Products with several matrices.
pub trait Products: FrozenProduct + LowRankLoops {
    /// `x W^T` of every layer; that of an only one is added to `onto`, if that is there.
    fn products(
        x: &FloatTensor<Self>,
        layers: &[Layer<FloatTensor<Self>>],
        onto: Option<&FloatTensor<Self>>,
    ) -> Vec<FloatTensor<Self>>;

    /// The sum of `dy W` over layers, each with its `dy`, if there are any.
    fn sum_of_products(terms: &[Term<Self>]) -> Option<FloatTensor<Self>>;
}

/// A layer and the gradient at its result.
pub type Term<'a, B> = (&'a Layer<FloatTensor<B>>, FloatTensor<B>);

impl<B: Host> Products for B {
    fn products(
        x: &FloatTensor<Self>,
        layers: &[Layer<FloatTensor<Self>>],
        onto: Option<&FloatTensor<Self>>,
    ) -> Vec<FloatTensor<Self>> {
        let Some(precision) = of_all::<B>(layers.iter()).filter(|_| B::lends(x)) else {
            return one_by_one::<B>(x, layers, onto);
        };
        let _product = trace_span!("product").entered();
        let shape = |layer: &Layer<_>| Shape::new([x.shape()[0], layer.w.shape()[0]]);
        let shapes: Vec<_> = layers.iter().map(shape).collect();
        write_all::<B>(&shapes, &x.device(), |outs| {
            let products = layers.iter().map(|layer| layer.w.on_host()).zip(outs).collect();
            product::forward(products, B::numbers(x), onto.map(B::numbers), precision);
        })
    }

    fn sum_of_products(terms: &[Term<Self>]) -> Option<FloatTensor<Self>> {
        let (first, dy) = terms.first()?;
        let lent = terms.iter().all(|(_, dy)| B::lends(dy));
        let Some(precision) = of_all::<B>(terms.iter().map(|(layer, _)| *layer)).filter(|_| lent) else {
            return sum_one_by_one::<B>(terms);
        };
        let _product = trace_span!("product").entered();
        let shape = Shape::new([dy.shape()[0], first.w.shape()[1]]);
        let terms: Vec<_> = terms.iter().map(|(layer, dy)| (layer.w.on_host(), B::numbers(dy))).collect();
        Some(B::write(shape, &dy.device(), |out| product::backward(&terms, precision, out)).0)
    }
}

/// The precision of all products, where it is one.
fn of_all<'a, B: Backend>(mut layers: impl Iterator<Item = &'a Layer<FloatTensor<B>>>) -> Option<Precision> {
    let precision = layers.next()?.precision;
    layers.all(|layer| layer.precision == precision).then_some(precision)
}

fn one_by_one<B: FrozenProduct>(
    x: &FloatTensor<B>,
    layers: &[Layer<FloatTensor<B>>],
    onto: Option<&FloatTensor<B>>,
) -> Vec<FloatTensor<B>> {
    let product = |layer: &Layer<_>| {
        let y = B::frozen_product(x.clone(), layer.w.clone(), Direction::Forward, layer.precision);
        match onto {
            Some(onto) => B::float_add(y, onto.clone()),
            None => y,
        }
    };
    layers.iter().map(product).collect()
}

fn sum_one_by_one<B: FrozenProduct>(terms: &[Term<B>]) -> Option<FloatTensor<B>> {
    let product = |(layer, dy): &Term<B>| {
        B::frozen_product(dy.clone(), layer.w.clone(), Direction::Backward, layer.precision)
    };
    terms.iter().map(product).reduce(B::float_add)
}

#[cfg(feature = "cube")]
impl Products for burn::backend::Cube {
    fn products(
        x: &FloatTensor<Self>,
        layers: &[Layer<FloatTensor<Self>>],
        onto: Option<&FloatTensor<Self>>,
    ) -> Vec<FloatTensor<Self>> {
        one_by_one::<Self>(x, layers, onto)
    }

    fn sum_of_products(terms: &[Term<Self>]) -> Option<FloatTensor<Self>> {
        sum_one_by_one::<Self>(terms)
    }
}

/// The results, and for the way back `scale * dropout(x) A^T` of every adapter.
fn forward<B: Products>(
    x: &FloatTensor<B>,
    layers: &Layers<B>,
) -> (Vec<FloatTensor<B>>, Vec<Option<B::Numbers>>) {
    let products = B::products(x, &layers.layers, layers.onto.as_ref());
    let updated = products.into_iter().zip(&layers.layers).map(|(y, layer)| match &layer.update {
        Some(Update { a, b, scaling }) => {
            let (y, low) = <B as LowRankLoops>::forward(y, x, [a, b], *scaling);
            (y, Some(low))
        }
        None => (y, None),
    });
    updated.unzip()
}

impl<B: Products> FrozenLayers for B {
    fn frozen_layers(x: FloatTensor<Self>, layers: Layers<Self>) -> Vec<FloatTensor<Self>> {
        forward::<B>(&B::contiguous(x), &layers.map(B::contiguous)).0
    }
}

impl<B: Products, C: CheckpointStrategy> FrozenLayers for Autodiff<B, C> {
    fn frozen_layers(x: FloatTensor<Self>, layers: Layers<Self>) -> Vec<FloatTensor<Self>> {
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
    layers: Layers<Autodiff<B, C>>,
) -> [FloatTensor<Autodiff<B, C>>; N] {
    let factors = layers.layers.iter().map(|layer| layer.factors().map_or([None; 2], |pair| pair.map(Some)));
    let others: Vec<_> = [layers.onto.as_ref()].into_iter().chain(factors.flatten()).collect();
    let parents: [_; P] = std::array::from_fn(|parent| match parent {
        0 => x.node(),
        _ => others[parent - 1].unwrap_or(&x).node(),
    });
    let operation = Recorded::<N>.prepare::<C>(parents).compute_bound().stateful();
    let x = B::contiguous(x.into_primitive());
    let layers: Layers<B> = layers.map(|tensor| B::contiguous(tensor.into_primitive()));
    let (results, low) = forward::<B>(&x, &layers);
    let (arrived, nothing) = (Arrived::none(), nothing::<B>(&x.device()));
    let node = match operation {
        OpsKind::Tracked(prep) => {
            let (onto, x) = (layers.onto.is_some(), low.iter().any(Option::is_some).then_some(x));
            prep.finish(Saved { x, layers: layers.layers, low, onto, arrived: arrived.clone() }, nothing)
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
    arrived: Arrived<FloatTensor<B>, N>,
}

/// The layers with their adapters in an autodiff graph.
#[derive(Debug)]
struct Recorded<const N: usize>;

impl<B: Products, const N: usize, const P: usize> Backward<B, P> for Recorded<N> {
    type State = Saved<B, N>;

    fn backward(self, ops: Ops<Self::State, P>, grads: &mut Gradients, _: &mut Checkpointer) {
        let Saved { x, layers, low, onto, arrived } = ops.state;
        grads.consume::<B>(&ops.node);
        let dys = arrived.take().map(|dy| dy.map(B::contiguous));
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let mut gradients = [const { None }; P];
        gradients[1] = dys[0].clone().filter(|_| onto);
        let terms = layers.iter().zip(&dys).filter_map(|(layer, dy)| Some((layer, dy.clone()?)));
        let mut dx = wanted[0].then(|| B::sum_of_products(&terms.collect::<Vec<_>>())).flatten();
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
