use std::ops::Range;

use burn::tensor::{Bool, Device, Tensor};

/// Which rows of the keys the rows of the queries may look at: one record of a batch, or the
/// new tokens of a generation against all before them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Rows of the queries.
    pub queries: Range<usize>,
    /// Rows of the keys and values. The last of them belongs to the last query.
    pub keys: Range<usize>,
}

impl Span {
    /// A whole record: the same rows on both sides.
    pub fn document(rows: Range<usize>) -> Self {
        Self { queries: rows.clone(), keys: rows }
    }
}

/// Causal grouped-query attention, `softmax(q k^T / sqrt(head_dim)) v`, within each span and
/// never across (Ainslie et al. 2023, <https://arxiv.org/abs/2305.13245>). Keys and values are not
/// repeated: the query heads that share a key head are stacked into one taller product.
///
/// # Shapes
/// - q: `[query tokens, heads, head_dim]`
/// - k, v: `[key tokens, kv_heads, head_dim]`
/// - result: `[query tokens, heads * head_dim]`
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
