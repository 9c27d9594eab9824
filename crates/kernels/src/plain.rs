//! The operations in burn's own: what every device without an implementation runs, and what
//! implementations are compared with.

use std::ops::Range;

use burn::tensor::{Bool, Device, IndexingUpdateOp, Int, Tensor, TensorData, activation::silu};

use crate::adamw::Factors;
use crate::{Activation, AdamWState, Mask, RotaryTables, Scaling, Scoring, Span};

/// See [`crate::rms_norm`].
pub fn rms_norm(x: Tensor<2>, weight: &Tensor<1>, eps: f64) -> Tensor<2> {
    let mean_square = x.clone().square().mean_dim(1); // [tokens, 1]
    x / (mean_square + eps).sqrt() * weight.clone().unsqueeze()
}

/// See [`crate::Dropout`].
pub fn dropout(x: Tensor<2>, mask: Mask) -> Tensor<2> {
    let [tokens, features] = x.dims();
    let mut kept = vec![1.0_f32; tokens * features];
    mask.apply(0, &mut kept, features);
    let device = x.device();
    x * Tensor::from_data(TensorData::new(kept, [tokens, features]), &device)
}

/// See [`crate::AdamW::step`].
pub fn adamw(
    parameter: Tensor<2>,
    gradient: Tensor<2>,
    state: &mut AdamWState,
    factors: Factors,
) -> Tensor<2> {
    let [beta1, beta2] = factors.betas;
    state.m = state.m.clone() * beta1 + gradient.clone() * (1.0 - beta1);
    state.v = state.v.clone() * beta2 + gradient.square() * (1.0 - beta2);
    let denominator = (state.v.clone() / factors.correction).sqrt() + factors.eps;
    parameter * factors.kept - state.m.clone() / denominator * factors.learning_rate
}

/// See [`crate::add_low_rank`].
pub fn add_low_rank(
    y: Tensor<2>,
    x: Tensor<2>,
    a: &Tensor<2>,
    b: &Tensor<2>,
    Scaling { scale, mask }: Scaling,
) -> Tensor<2> {
    let x = match mask {
        Some(mask) => dropout(x, mask),
        None => x,
    };
    let low = x.matmul(a.clone().transpose()); // [tokens, rank]
    y + low.matmul(b.clone().transpose()) * scale
}

/// See [`crate::glu()`].
pub fn glu(gate: Tensor<2>, up: Tensor<2>, activation: Activation) -> Tensor<2> {
    match activation {
        Activation::Silu => silu(gate) * up,
        Activation::GeluTanh => {
            let inner = gate.clone() + gate.clone().powi_scalar(3) * 0.044_715;
            let tanh = (inner * (2.0 / std::f64::consts::PI).sqrt()).tanh();
            gate * 0.5 * (tanh + 1.0) * up
        }
    }
}

/// See [`crate::soft_cap()`].
pub fn soft_cap<const D: usize>(x: Tensor<D>, cap: f32) -> Tensor<D> {
    (x / cap).tanh() * cap
}

/// See [`RotaryTables::apply`].
pub fn rotary(x: Tensor<3>, tables: &RotaryTables) -> Tensor<3> {
    let half = x.dims()[2] / 2;
    let x1 = x.clone().narrow(2, 0, half);
    let x2 = x.narrow(2, half, half);
    let (cos, sin) = (tables.cos.clone(), tables.sin.clone());
    let y1 = x1.clone() * cos.clone() - x2.clone() * sin.clone();
    let y2 = x2 * cos + x1 * sin;
    Tensor::cat(vec![y1, y2], 2)
}

/// See [`crate::attention()`].
pub fn attention(q: &Tensor<3>, k: &Tensor<3>, v: &Tensor<3>, spans: &[Span], scoring: Scoring) -> Tensor<2> {
    let documents = spans.iter().map(|span| {
        let rows = |x: &Tensor<3>, r: &Range<usize>| x.clone().narrow(0, r.start, r.len());
        attend(rows(q, &span.queries), rows(k, &span.keys), rows(v, &span.keys), scoring)
    });
    Tensor::cat(documents.collect(), 0)
}

/// One span. Shape trail: n queries, m keys, g = `heads / kv_heads`, d = `head_dim`.
fn attend(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, scoring: Scoring) -> Tensor<2> {
    let [n, heads, d] = q.dims();
    let [m, kv_heads, _] = k.dims();
    let g = heads / kv_heads;

    let q = q.reshape([n, kv_heads, g, d]).permute([1, 2, 0, 3]); // (kv, g, n, d)
    let q = q.reshape([kv_heads, g * n, d]) * scoring.scale;
    let k = k.permute([1, 2, 0]); // (kv, d, m)
    let v = v.swap_dims(0, 1); // (kv, m, d)

    let mut scores = q.matmul(k); // (kv, g * n, m)
    if let Some(cap) = scoring.soft_cap {
        scores = soft_cap(scores, cap);
    }
    if n > 1 || scoring.first(m) > 0 {
        let unseen = unseen(g, n, m, scoring, &scores.device()).expand([kv_heads, g * n, m]);
        scores = scores.mask_fill(unseen, f32::NEG_INFINITY);
    }
    let out = softmax(scores).matmul(v); // (kv, g * n, d)
    out.reshape([kv_heads, g, n, d]).permute([2, 0, 1, 3]).reshape([n, heads * d])
}

/// Over the last dimension. burn's own is fused by some backends where no graph is recorded; in
/// plain operations a block computes the same bits whether it is recorded or not.
fn softmax(scores: Tensor<3>) -> Tensor<3> {
    let top = scores.clone().detach().max_dim(2);
    let weights = (scores - top).exp();
    let total = weights.clone().sum_dim(2);
    weights / total
}

/// `[1, g * n, m]`, true where a key lies in its query's future, or before its window.
fn unseen(g: usize, n: usize, m: usize, scoring: Scoring, device: &Device) -> Tensor<3, Bool> {
    let before = (m - n) as i64;
    let mut one = Tensor::<2, Bool>::tril_mask([n, m], before, device);
    if let Some(window) = scoring.window {
        let key = Tensor::<1, Int>::arange(0..m as i64, device).unsqueeze_dim::<2>(0).expand([n, m]);
        let query = Tensor::<1, Int>::arange(before..m as i64, device).unsqueeze_dim::<2>(1).expand([n, m]);
        one = one.bool_or((query - key).greater_equal_elem(window as i64));
    }
    one.unsqueeze_dim::<3>(0).repeat_dim(0, g).reshape([1, g * n, m])
}

/// Cross-entropy of rows of logits: the losses `[rows]`, and their gradient at the logits,
/// `softmax(logits) - onehot(target)`, `[rows, vocab]`.
pub fn losses_and_slopes(logits: Tensor<2>, targets: &[u32]) -> (Tensor<1>, Tensor<2>) {
    let ids: Vec<i64> = targets.iter().map(|&target| i64::from(target)).collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [targets.len(), 1]), &logits.device());
    let at_targets = logits.clone().gather(1, ids.clone());
    let top = logits.clone().max_dim(1);
    let weights = (logits - top.clone()).exp();
    let total = weights.clone().sum_dim(1); // [rows, 1]
    let losses = total.clone().log() + top - at_targets;
    let minus_one = losses.ones_like().neg();
    let slopes = (weights / total).scatter(1, ids, minus_one, IndexingUpdateOp::Add);
    (losses.squeeze_dim(1), slopes)
}
