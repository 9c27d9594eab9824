use burn::tensor::{Device, Tensor};
use pronk_kernels::{Dropout, FrozenLinear, add_low_rank};

use crate::Adapter;

/// What a forward pass needs beside its input: the adapter, and the dropout of the moment.
#[derive(Debug, Clone, Copy)]
pub struct ForwardMode<'a> {
    /// The adapter to add to the base; `None` is the base alone.
    pub adapter: Option<&'a Adapter>,
    /// Dropout in front of the adapter, while training.
    pub dropout: Option<Dropout>,
}

impl<'a> ForwardMode<'a> {
    /// The base with an adapter, as it answers.
    pub fn inference(adapter: Option<&'a Adapter>) -> Self {
        Self { adapter, dropout: None }
    }
}

/// A linear layer of the base at the place where an adapter may sit.
#[derive(Debug, Clone)]
pub struct LoraLinear {
    name: String,
    base: FrozenLinear,
}

impl LoraLinear {
    /// `name` is the module's name in the checkpoint, without `.weight`.
    pub fn new(name: String, base: FrozenLinear) -> Self {
        Self { name, base }
    }

    /// The same layer with its weight on `device`.
    #[must_use]
    pub fn on_device(&self, device: &Device) -> Self {
        Self { name: self.name.clone(), base: self.base.on_device(device) }
    }

    /// `base(x) + scale * (dropout(x) A^T) B^T`, or `base(x)` where no adapter sits.
    ///
    /// # Shapes
    /// - x: `[tokens, in]`
    /// - result: `[tokens, out]`
    pub fn forward(&self, x: Tensor<2>, mode: ForwardMode) -> Tensor<2> {
        let adapted = mode.adapter.is_some_and(|adapter| adapter.pairs.contains_key(&self.name));
        if !adapted {
            return self.base.forward(x);
        }
        let y = self.base.forward(x.clone());
        low_rank_update(y, x, &self.name, mode)
    }
}

/// `y + scale * (dropout(x) A^T) B^T` of the module called `name`, or `y` where no adapter sits on it.
///
/// # Shapes
/// - x: `[tokens, in]`
/// - y and result: `[tokens, out]`
pub fn low_rank_update(y: Tensor<2>, x: Tensor<2>, name: &str, mode: ForwardMode) -> Tensor<2> {
    let Some(pair) = mode.adapter.and_then(|adapter| adapter.pairs.get(name)) else { return y };
    let x = match mode.dropout {
        Some(dropout) => dropout.apply(x, name),
        None => x,
    };
    add_low_rank(y, x, &pair.a, &pair.b, pair.scale)
}
