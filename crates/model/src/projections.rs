use burn::tensor::{Device, Tensor};
use pronk_lora::{ForwardMode, LoraLinear, low_rank_update};

/// Linear layers that read the same input: `N` of them, or one that holds them all.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // two a block
pub enum Projections<const N: usize> {
    /// Each for itself.
    Apart([LoraLinear; N]),
    /// One layer, and the name and width of each part of its output. An adapter sits on the whole,
    /// on parts, or on both.
    Packed(LoraLinear, [(String, usize); N]),
}

impl<const N: usize> Projections<N> {
    /// # Shapes
    /// - x: `[tokens, in]`
    /// - each result: `[tokens, out]`, of its layer
    pub fn forward(&self, x: &Tensor<2>, mode: ForwardMode) -> [Tensor<2>; N] {
        match self {
            Self::Apart(layers) => LoraLinear::forward_all(layers.each_ref(), x, mode),
            Self::Packed(layer, parts) => {
                let y = layer.forward(x, mode);
                let mut start = 0;
                parts.each_ref().map(|(name, width)| {
                    let part = y.clone().narrow(1, start, *width);
                    start += width;
                    low_rank_update(part, x.clone(), name, mode)
                })
            }
        }
    }

    /// The layers that the base has.
    pub fn layers(&self) -> &[LoraLinear] {
        match self {
            Self::Apart(layers) => layers,
            Self::Packed(layer, _) => std::slice::from_ref(layer),
        }
    }

    /// The same layers with their weights on `device`.
    pub fn on_device(&self, device: &Device) -> Self {
        match self {
            Self::Apart(layers) => Self::Apart(layers.each_ref().map(|layer| layer.on_device(device))),
            Self::Packed(layer, parts) => Self::Packed(layer.on_device(device), parts.clone()),
        }
    }
}
