use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use burn::tensor::{Device, Tensor};
use pronk_kernels::{Activation, Dropout, FrozenLinear, Precision, Scaling, Update, add_low_rank, residual};

use crate::dora::weight_norms;
use crate::{Adapter, LoraPair, WeightNorms};

/// What a forward pass needs beside its input: the adapter, and the dropout of the moment.
#[derive(Debug, Clone, Copy)]
pub struct ForwardMode<'a> {
    /// The adapter to add to the base; `None` is the base alone.
    pub adapter: Option<&'a Adapter>,
    /// Dropout in front of the adapter, while training.
    pub dropout: Option<Dropout>,
    /// Where `DoRA`'s norms are kept while base and adapter stay as they are; without, every pass
    /// computes them.
    pub norms: Option<&'a WeightNorms>,
    /// Where inputs of layers are kept for who wants to look at them.
    pub inputs: Option<&'a LayerInputs>,
}

impl<'a> ForwardMode<'a> {
    /// The base with an adapter, as it answers.
    pub fn inference(adapter: Option<&'a Adapter>) -> Self {
        Self { adapter, dropout: None, norms: None, inputs: None }
    }

    /// The same with norms kept in `norms`, unless it keeps them already.
    #[must_use]
    pub fn with_norms(self, norms: &'a WeightNorms) -> Self {
        Self { norms: self.norms.or(Some(norms)), ..self }
    }
}

/// What layers have read in the last forward pass, `[tokens, in]`, by their names.
#[derive(Debug, Default)]
pub struct LayerInputs(Mutex<BTreeMap<String, Tensor<2>>>);

impl LayerInputs {
    fn keep(&self, layer: &str, x: &Tensor<2>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(layer.into(), x.clone());
    }

    /// All of them, and none is left.
    pub fn take(&self) -> BTreeMap<String, Tensor<2>> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A linear layer of the base at the place where an adapter may sit.
#[derive(Debug, Clone)]
pub struct LoraLinear {
    name: String,
    base: FrozenLinear,
    /// Squared norms of the weight's rows, `[out]`, once they were needed.
    squares: Arc<OnceLock<Tensor<1>>>,
}

impl LoraLinear {
    /// `name` is the module's name in the checkpoint, without `.weight`.
    pub fn new(name: String, base: FrozenLinear) -> Self {
        Self { name, base, squares: Arc::default() }
    }

    /// The module's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What factors of the base's products are rounded to.
    pub fn precision(&self) -> Precision {
        self.base.precision()
    }

    /// The same layer with its weight on `device`.
    #[must_use]
    pub fn on_device(&self, device: &Device) -> Self {
        Self { base: self.base.on_device(device), ..self.clone() }
    }

    /// `base(x) + scale * (dropout(x) A^T) B^T`, or `base(x)` where no adapter sits. With `DoRA`, what is
    /// in front of the bias is scaled by `s = magnitude / |W + scale B A|`, row by row of the weight. Dropout is then in
    /// front of all that the adapter changes, as in PEFT: `W x + (s - 1) W dropout(x) + s scale B A dropout(x)`.
    ///
    /// # Shapes
    /// - x: `[tokens, in]`
    /// - result: `[tokens, out]`
    pub fn forward(&self, x: &Tensor<2>, mode: ForwardMode) -> Tensor<2> {
        let [y] = Self::forward_all([self], x, mode);
        y
    }

    /// [`Self::forward`] of layers that read the same input, in one operation as far as possible.
    ///
    /// # Shapes
    /// - x: `[tokens, in]`
    /// - each result: `[tokens, out]`, of its layer
    pub fn forward_all<const N: usize>(
        layers: [&Self; N],
        x: &Tensor<2>,
        mode: ForwardMode,
    ) -> [Tensor<2>; N] {
        let products = layers.map(|layer| (&layer.base, layer.update(mode)));
        let mut products = FrozenLinear::products(products.into(), x, None).into_iter();
        layers.map(|layer| {
            let y = products.next().unwrap_or_else(|| unreachable!("a product of every layer"));
            layer.finished(y, x, mode)
        })
    }

    /// `down(activation(gate(x)) * up(x))`, added to `onto` if that is there, in one operation where there is one: where no
    /// adapter sits on the three, and nobody wants to look at what they read. See [`FrozenLinear::feed_forward`].
    ///
    /// # Shapes
    /// - x, onto and result: `[tokens, hidden]`
    pub fn feed_forward(
        layers: [&Self; 3],
        x: &Tensor<2>,
        onto: Option<&Tensor<2>>,
        activation: Activation,
        mode: ForwardMode,
        read: bool,
    ) -> Option<Tensor<2>> {
        let bare = |layer: &Self| layer.pair(mode).is_none() && layer.trained_bias(mode).is_none();
        if mode.inputs.is_some() || !layers.into_iter().all(bare) {
            return None;
        }
        FrozenLinear::feed_forward(layers.map(|layer| &layer.base), x, onto, activation, read)
    }

    /// `stream` with [`Self::forward`] added to it.
    ///
    /// # Shapes
    /// - x: `[tokens, in]`
    /// - stream and result: `[tokens, out]`
    pub fn forward_onto(&self, stream: Tensor<2>, x: &Tensor<2>, mode: ForwardMode) -> Tensor<2> {
        if self.pair(mode).is_some_and(|pair| pair.magnitude.is_some()) {
            return residual(stream, self.forward(x, mode));
        }
        let sum = self.base.product_onto(&stream, x, self.update(mode));
        self.finished(sum, x, mode)
    }

    /// What an adapter adds to the product of the base with the whole input.
    fn update(&self, mode: ForwardMode) -> Option<Update<Tensor<2>>> {
        let pair = self.pair(mode)?;
        let scaling = scaling(pair, &self.name, mode);
        let of_input = pair.magnitude.is_none() || scaling.mask.is_none();
        of_input.then(|| Update { a: pair.a.clone(), b: pair.b.clone(), scaling })
    }

    /// All that follows a product with its update.
    fn finished(&self, y: Tensor<2>, x: &Tensor<2>, mode: ForwardMode) -> Tensor<2> {
        self.keep_input(x, mode);
        let Some(pair) = self.pair(mode) else { return self.add_bias(y, mode) };
        let Some(magnitude) = &pair.magnitude else {
            return self.add_bias(with_fixed(y, x.clone(), pair), mode);
        };
        let norms = || weight_norms(&self.base, self.squares(&x.device()), pair);
        let norms = mode.norms.map_or_else(norms, |known| known.of(&self.name, norms));
        let stretch = magnitude.clone() / norms;
        let Some(mask) = scaling(pair, &self.name, mode).mask else {
            return self.add_bias(with_fixed(y, x.clone(), pair) * stretch, mode);
        };
        let kept = mask.hide(x.clone());
        let of_kept = self.base.product(kept.clone());
        let unchanged = y - of_kept.clone();
        let changed = add_low_rank(of_kept, kept, &pair.a, &pair.b, pair.scale);
        self.add_bias(unchanged + changed * stretch, mode)
    }

    fn keep_input(&self, x: &Tensor<2>, mode: ForwardMode) {
        if let Some(inputs) = mode.inputs {
            inputs.keep(&self.name, x);
        }
    }

    fn pair<'a>(&self, mode: ForwardMode<'a>) -> Option<&'a LoraPair> {
        mode.adapter.and_then(|adapter| adapter.pairs.get(&self.name))
    }

    /// [`Self::forward`] for a graph whose result nobody reads: see [`FrozenLinear::forward_unread`].
    /// `DoRA`'s magnitude reads it, for its gradient.
    ///
    /// # Shapes
    /// - x: `[tokens, in]`
    /// - result: `[tokens, out]`
    pub fn forward_unread(&self, x: Tensor<2>, mode: ForwardMode) -> Tensor<2> {
        if self.pair(mode).is_some_and(|pair| pair.magnitude.is_some()) {
            return self.forward(&x, mode);
        }
        let y = self.base.forward_unread(x.clone());
        let y = if self.trained_bias(mode).is_some() { self.add_bias(y, mode) } else { y };
        low_rank_update(y, x, &self.name, mode)
    }

    /// `y` with the adapter's bias, or else the base's.
    fn add_bias(&self, y: Tensor<2>, mode: ForwardMode) -> Tensor<2> {
        match self.trained_bias(mode) {
            Some(bias) => y + bias.clone(),
            None => self.base.add_bias(y),
        }
    }

    fn trained_bias<'a>(&self, mode: ForwardMode<'a>) -> Option<&'a Tensor<2>> {
        mode.adapter.and_then(|adapter| adapter.bias(&self.name))
    }

    /// Sets `DoRA`'s magnitude to the norms of the updated weight's rows, so that it changes nothing yet.
    pub fn set_magnitude(&self, pair: &mut LoraPair) {
        pair.magnitude = Some(weight_norms(&self.base, self.squares(&pair.a.device()), pair));
    }

    fn squares(&self, device: &Device) -> &Tensor<1> {
        self.squares.get_or_init(|| self.base.row_squares(&device.clone().without_autodiff()))
    }
}

/// `y + scale * (dropout(x) A^T) B^T` of the module called `name`, or `y` where no adapter sits on it. Dropout leaves
/// alone what is fixed beside the pair: it is a part of the base.
///
/// # Shapes
/// - x: `[tokens, in]`
/// - y and result: `[tokens, out]`
pub fn low_rank_update(y: Tensor<2>, x: Tensor<2>, name: &str, mode: ForwardMode) -> Tensor<2> {
    let Some(pair) = mode.adapter.and_then(|adapter| adapter.pairs.get(name)) else { return y };
    let y = add_low_rank(y, x.clone(), &pair.a, &pair.b, scaling(pair, name, mode));
    with_fixed(y, x, pair)
}

fn scaling(pair: &LoraPair, name: &str, mode: ForwardMode) -> Scaling {
    Scaling { scale: pair.scale, mask: mode.dropout.and_then(|dropout| dropout.mask(name)) }
}

/// `y` with what is fixed beside the pair.
fn with_fixed(y: Tensor<2>, x: Tensor<2>, pair: &LoraPair) -> Tensor<2> {
    match &pair.fixed {
        Some(fixed) => fixed.add(&y, x, pair.scale),
        None => y,
    }
}
