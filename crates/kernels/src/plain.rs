//! The operations in burn's own: what every device without an implementation runs, and what
//! implementations are compared with.

use std::ops::Range;

use burn::tensor::{Bool, Device, Tensor, activation::silu};

use crate::{RotaryTables, Span};

/// See [`crate::rms_norm`].
pub fn rms_norm(x: Tensor<2>, weight: &Tensor<1>, eps: f64) -> Tensor<2> {
    let mean_square = x.clone().square().mean_dim(1); // [tokens, 1]
    x / (mean_square + eps).sqrt() * weight.clone().unsqueeze()
}

/// See [`crate::swiglu()`].
pub fn swiglu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    silu(gate) * up
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
pub fn attention(q: &Tensor<3>, k: &Tensor<3>, v: &Tensor<3>, spans: &[Span]) -> Tensor<2> {
    let documents = spans.iter().map(|span| {
        let rows = |x: &Tensor<3>, r: &Range<usize>| x.clone().narrow(0, r.start, r.len());
        attend(rows(q, &span.queries), rows(k, &span.keys), rows(v, &span.keys))
    });
    Tensor::cat(documents.collect(), 0)
}

/// One span. Shape trail: n queries, m keys, g = `heads / kv_heads`, d = `head_dim`.
fn attend(q: Tensor<3>, k: Tensor<3>, v: Tensor<3>) -> Tensor<2> {
    let [n, heads, d] = q.dims();
    let [m, kv_heads, _] = k.dims();
    let g = heads / kv_heads;

    let q = q.reshape([n, kv_heads, g, d]).permute([1, 2, 0, 3]); // (kv, g, n, d)
    let q = q.reshape([kv_heads, g * n, d]) / (d as f64).sqrt();
    let k = k.permute([1, 2, 0]); // (kv, d, m)
    let v = v.swap_dims(0, 1); // (kv, m, d)

    let mut scores = q.matmul(k); // (kv, g * n, m)
    if n > 1 {
        let future = future_mask(g, n, m, &scores.device()).expand([kv_heads, g * n, m]);
        scores = scores.mask_fill(future, f32::NEG_INFINITY);
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

/// `[1, g * n, m]`, true where a key lies in its query's future.
fn future_mask(g: usize, n: usize, m: usize, device: &Device) -> Tensor<3, Bool> {
    let one = Tensor::<2, Bool>::tril_mask([n, m], (m - n) as i64, device);
    one.unsqueeze_dim::<3>(0).repeat_dim(0, g).reshape([1, g * n, m])
}
