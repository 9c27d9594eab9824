use burn::tensor::{Device, Tensor};
use pronk_kernels::{Activation, Scoring, attention, glu, residual, rms_norm, rms_norm_beside};
use pronk_lora::{ForwardMode, LoraLinear};

use crate::Layout;
use crate::projections::Projections;

/// Keys and values of the tokens so far, for one block of a generation.
#[derive(Debug, Clone, Default)]
pub struct LayerCache {
    kept: Option<(Tensor<3>, Tensor<3>)>,
}

impl LayerCache {
    /// Forgets all but the first `tokens`.
    pub(crate) fn truncate(&mut self, tokens: usize) {
        self.kept = self.kept.take().filter(|_| tokens > 0).map(|(k, v)| {
            let first = |x: Tensor<3>| {
                let kept = tokens.min(x.dims()[0]);
                x.narrow(0, 0, kept)
            };
            (first(k), first(v))
        });
    }

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

/// One decoder block: attention and a gated feed-forward, each with norms around it and beside a
/// residual connection.
#[derive(Debug, Clone)]
pub struct Block {
    pub(crate) attention_norms: NormsAround,
    pub(crate) qkv: Projections<3>,
    pub(crate) qk_norms: Option<[Tensor<1>; 2]>,
    pub(crate) o_proj: LoraLinear,
    pub(crate) feed_forward_norms: NormsAround,
    pub(crate) gate_up: Projections<2>,
    pub(crate) down_proj: LoraLinear,
    pub(crate) activation: Activation,
    pub(crate) scoring: Scoring,
    pub(crate) head_dim: usize,
    pub(crate) rms_norm_eps: f64,
}

/// The norms of the input, and in some families of the output, of one half of a block.
#[derive(Debug, Clone)]
pub struct NormsAround {
    pub(crate) before: Tensor<1>,
    pub(crate) after: Option<Tensor<1>>,
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
        let x = self.attended(x, layout, mode, cache);
        self.fed_forward(x, mode, true)
    }

    /// The graph of [`Self::forward`] for gradients alone: nobody reads its output, and the last product
    /// is left out where nothing else does.
    ///
    /// # Shapes
    /// - x and result: `[tokens, hidden]`
    pub fn forward_unread(&self, x: Tensor<2>, layout: &Layout, mode: ForwardMode) -> Tensor<2> {
        let x = self.attended(x, layout, mode, None);
        self.fed_forward(x, mode, self.feed_forward_norms.after.is_some())
    }

    /// `x` with what attention adds to it.
    fn attended(
        &self,
        x: Tensor<2>,
        layout: &Layout,
        mode: ForwardMode,
        cache: Option<&mut LayerCache>,
    ) -> Tensor<2> {
        let [x, h] = rms_norm_beside(x, &self.attention_norms.before, self.rms_norm_eps);
        self.onto(x, &self.o_proj, &self.attention(h, layout, mode, cache), &self.attention_norms, mode)
    }

    /// `x` with what the feed-forward adds to it, in one operation where there is one. See [`LoraLinear::feed_forward`].
    fn fed_forward(&self, x: Tensor<2>, mode: ForwardMode, read: bool) -> Tensor<2> {
        let Self { feed_forward_norms: norms, down_proj, activation, .. } = self;
        let [x, h] = rms_norm_beside(x, &norms.before, self.rms_norm_eps);
        if let Projections::Apart([gate, up]) = &self.gate_up {
            let onto = norms.after.is_none().then_some(&x);
            let layers = [gate, up, down_proj];
            if let Some(y) = LoraLinear::feed_forward(layers, &h, onto, *activation, mode, read) {
                return match &norms.after {
                    Some(weight) => residual(x, rms_norm(y, weight, self.rms_norm_eps)),
                    None => y,
                };
            }
        }
        let h = self.gated(h, mode);
        if read {
            self.onto(x, down_proj, &h, norms, mode)
        } else {
            residual(x, down_proj.forward_unread(h, mode))
        }
    }

    /// `x + layer(h)`, with the norm between where there is one.
    fn onto(
        &self,
        x: Tensor<2>,
        layer: &LoraLinear,
        h: &Tensor<2>,
        norms: &NormsAround,
        mode: ForwardMode,
    ) -> Tensor<2> {
        match &norms.after {
            Some(weight) => residual(x, rms_norm(layer.forward(h, mode), weight, self.rms_norm_eps)),
            None => layer.forward_onto(x, h, mode),
        }
    }

    /// Its linear layers' names, those together that read the same input.
    pub(crate) fn readers(&self) -> [Vec<String>; 4] {
        let (o_proj, down_proj) = (std::slice::from_ref(&self.o_proj), std::slice::from_ref(&self.down_proj));
        [self.qkv.layers(), o_proj, self.gate_up.layers(), down_proj]
            .map(|layers| layers.iter().map(|layer| layer.name().to_owned()).collect())
    }

    /// Its linear layers, in the order in which they run.
    pub(crate) fn linears(&self) -> impl Iterator<Item = &LoraLinear> {
        let (o_proj, down_proj) = (std::slice::from_ref(&self.o_proj), std::slice::from_ref(&self.down_proj));
        [self.qkv.layers(), o_proj, self.gate_up.layers(), down_proj].into_iter().flatten()
    }

    /// The same block with its weights on `device`.
    pub(crate) fn on_device(&self, device: &Device) -> Self {
        Self {
            qkv: self.qkv.on_device(device),
            o_proj: self.o_proj.on_device(device),
            gate_up: self.gate_up.on_device(device),
            down_proj: self.down_proj.on_device(device),
            ..self.clone()
        }
    }

    /// What the values of all heads become, which the output projection reads.
    fn attention(
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
        let rotary = layout.rotary(self.scoring.window.is_some());
        let [q, k, v] = self.qkv.forward(&x, mode);
        drop(x);
        let [q_norm, k_norm] =
            self.qk_norms.as_ref().map_or([None, None], |norms| norms.each_ref().map(Some));
        let q = rotary.apply(heads(self.norm_heads(q, q_norm)));
        let k = rotary.apply(heads(self.norm_heads(k, k_norm)));
        let (k, v) = match cache {
            Some(cache) => cache.append(k, heads(v)),
            None => (k, heads(v)),
        };
        attention(q, &k, &v, &layout.spans, self.scoring)
    }

    /// Each head normed for itself, where there is a norm of heads.
    fn norm_heads(&self, x: Tensor<2>, weight: Option<&Tensor<1>>) -> Tensor<2> {
        let Some(weight) = weight else { return x };
        let [tokens, width] = x.dims();
        let heads = x.reshape([tokens * width / self.head_dim, self.head_dim]);
        rms_norm(heads, weight, self.rms_norm_eps).reshape([tokens, width])
    }

    /// What the feed-forward projects down.
    fn gated(&self, x: Tensor<2>, mode: ForwardMode) -> Tensor<2> {
        let [gate, up] = self.gate_up.forward(&x, mode);
        drop(x); // the block's largest tensors are still to come
        glu(gate, up, self.activation, self.gate_up.layers()[0].precision())
    }
}
