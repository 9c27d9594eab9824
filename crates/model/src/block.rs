use std::ops::Range;

use burn::tensor::{Device, Tensor};
use pronk_kernels::{Rotary, RotaryTables, Span, attention, rms_norm, swiglu};
use pronk_lora::{ForwardMode, LoraLinear};

use crate::DecoderConfig;

/// Where the rows of a batch stand: which record they belong to, and at which position in it.
#[derive(Debug, Clone)]
pub struct Layout {
    pub(crate) rotary: RotaryTables,
    pub(crate) spans: Vec<Span>,
}

impl Layout {
    /// Records lying one after another, `documents` their rows, `positions` one for each row.
    pub(crate) fn documents(
        rotary: &Rotary,
        positions: &[u32],
        documents: &[Range<usize>],
        device: &Device,
    ) -> Self {
        let spans = documents.iter().cloned().map(Span::document).collect();
        Self { rotary: rotary.tables(positions, device), spans }
    }

    /// `rows` new tokens behind the `before` tokens that a cache holds.
    pub(crate) fn continuation(rotary: &Rotary, before: usize, rows: usize, device: &Device) -> Self {
        let positions: Vec<u32> = (before..before + rows).map(|p| p as u32).collect();
        let span = Span { queries: 0..rows, keys: 0..before + rows };
        Self { rotary: rotary.tables(&positions, device), spans: vec![span] }
    }
}

/// Keys and values of the tokens so far, for one block of a generation.
#[derive(Debug, Clone, Default)]
pub struct LayerCache {
    kept: Option<(Tensor<3>, Tensor<3>)>,
}

impl LayerCache {
    /// Everything so far, with `k` and `v` behind it.
    fn append(&mut self, k: Tensor<3>, v: Tensor<3>) -> (Tensor<3>, Tensor<3>) {
        let all = match self.kept.take() {
            None => (k, v),
            Some((k0, v0)) => (Tensor::cat(vec![k0, k], 0), Tensor::cat(vec![v0, v], 0)),
        };
        self.kept = Some(all.clone());
        all
    }
}

/// One decoder block: attention and a gated feed-forward, each behind a norm and beside a
/// residual connection.
#[derive(Debug, Clone)]
pub struct Block {
    pub(crate) input_layernorm: Tensor<1>,
    pub(crate) q_proj: LoraLinear,
    pub(crate) k_proj: LoraLinear,
    pub(crate) v_proj: LoraLinear,
    pub(crate) o_proj: LoraLinear,
    pub(crate) post_attention_layernorm: Tensor<1>,
    pub(crate) gate_proj: LoraLinear,
    pub(crate) up_proj: LoraLinear,
    pub(crate) down_proj: LoraLinear,
    pub(crate) head_dim: usize,
    pub(crate) rms_norm_eps: f64,
}

impl Block {
    /// # Shapes
    /// - x and result: `[tokens, hidden]`
    pub fn forward(
        &self,
        x: Tensor<2>,
        layout: &Layout,
        mode: ForwardMode,
        cache: Option<&mut LayerCache>,
    ) -> Tensor<2> {
        let h = rms_norm(x.clone(), &self.input_layernorm, self.rms_norm_eps);
        let x = x + self.attend(h, layout, mode, cache);
        let h = rms_norm(x.clone(), &self.post_attention_layernorm, self.rms_norm_eps);
        x + self.feed_forward(h, mode)
    }

    /// The same block with its weights on `device`.
    pub(crate) fn on_device(&self, device: &Device) -> Self {
        let linear = |linear: &LoraLinear| linear.on_device(device);
        Self {
            input_layernorm: self.input_layernorm.clone(),
            q_proj: linear(&self.q_proj),
            k_proj: linear(&self.k_proj),
            v_proj: linear(&self.v_proj),
            o_proj: linear(&self.o_proj),
            post_attention_layernorm: self.post_attention_layernorm.clone(),
            gate_proj: linear(&self.gate_proj),
            up_proj: linear(&self.up_proj),
            down_proj: linear(&self.down_proj),
            head_dim: self.head_dim,
            rms_norm_eps: self.rms_norm_eps,
        }
    }

    fn attend(
        &self,
        x: Tensor<2>,
        layout: &Layout,
        mode: ForwardMode,
        cache: Option<&mut LayerCache>,
    ) -> Tensor<2> {
        let heads = |y: Tensor<2>| {
            let [tokens, width] = y.dims();
            y.reshape([tokens, width / self.head_dim, self.head_dim])
        };
        let q = layout.rotary.apply(heads(self.q_proj.forward(x.clone(), mode)));
        let k = layout.rotary.apply(heads(self.k_proj.forward(x.clone(), mode)));
        let v = heads(self.v_proj.forward(x, mode));
        let (k, v) = match cache {
            Some(cache) => cache.append(k, v),
            None => (k, v),
        };
        self.o_proj.forward(attention(q, &k, &v, &layout.spans), mode)
    }

    fn feed_forward(&self, x: Tensor<2>, mode: ForwardMode) -> Tensor<2> {
        let gate = self.gate_proj.forward(x.clone(), mode);
        let up = self.up_proj.forward(x, mode);
        self.down_proj.forward(swiglu(gate, up), mode)
    }
}

/// The rotary embedding that a configuration describes.
pub fn rotary(config: &DecoderConfig) -> Rotary {
    Rotary::new(config.head_dim, config.rope_theta, config.rope_scaling)
}
