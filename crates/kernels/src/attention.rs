// Loops have to end up inside the functions of `wide` that are compiled for wider vectors.
#![allow(clippy::inline_always)]

#[cfg_attr(not(feature = "cube"), allow(dead_code))]
mod buckets;
#[cfg(feature = "cube")]
mod card;
mod heads;
mod scoring;
mod tiles;

use std::ops::Range;
use std::sync::Arc;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::Tensor;

pub use self::buckets::attention_bytes_on_card;
pub use self::scoring::Scoring;
use self::tiles::Widths;
use crate::host::{Host, Loops, has_loops};
use crate::plain;

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

/// Causal grouped-query attention, `softmax(scores) v`, within each span and never across (Ainslie
/// et al. 2023, <https://arxiv.org/abs/2305.13245>); `scoring` says what the scores are. Keys and
/// values are not repeated: the query heads that share a key head are stacked into one taller
/// product.
///
/// # Shapes
/// - q: `[query tokens, heads, head_dim]`
/// - k, v: `[key tokens, kv_heads, head_dim]`
/// - result: `[query tokens, heads * head_dim]`
///
/// # Panics
/// Where the shapes do not fit, or spans are of other rows.
pub fn attention(q: Tensor<3>, k: &Tensor<3>, v: &Tensor<3>, spans: &[Span], scoring: Scoring) -> Tensor<2> {
    let [tokens, heads, dim] = q.dims();
    if !has_loops(&q) || !cover(spans, tokens, k.dims()[0]) {
        return plain::attention(&q, k, v, spans, scoring);
    }
    let [q, k, v] = [q, k.clone(), v.clone()].map(Tensor::into_dispatch);
    let y = Tensor::<3>::from_dispatch(Dispatch::attention(q, k, v, spans.into(), scoring));
    y.reshape([tokens, heads * dim])
}

/// Whether spans stand one behind another and hold every query and every key, none of them twice.
fn cover(spans: &[Span], queries: usize, keys: usize) -> bool {
    let end = spans.iter().try_fold((0, 0), |end, span| {
        let fits = (span.queries.start, span.keys.start) == end && span.queries.len() <= span.keys.len();
        fits.then_some((span.queries.end, span.keys.end))
    });
    end == Some((queries, keys))
}

/// The operation, for backends with loops of our own.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    LibTorch: cfg(feature = "tch"),
    Cube: cfg(feature = "cube"),
    Autodiff,
)]
pub trait Attention: Backend {
    /// See [`attention()`]; the result has the queries' shape.
    fn attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        spans: Arc<[Span]>,
        scoring: Scoring,
    ) -> FloatTensor<Self>;
}

/// The loops, over tensors whose numbers are in order.
trait AttentionLoops: Loops {
    /// Returns the logarithm of each query's sum of exponentials too.
    fn forward(
        q: FloatTensor<Self>,
        k: &FloatTensor<Self>,
        v: &FloatTensor<Self>,
        widths: Widths,
        spans: &[Span],
        scoring: Scoring,
    ) -> (FloatTensor<Self>, Self::Numbers);

    /// The gradients at `q`, `k` and `v`.
    fn backward(
        qkv: [FloatTensor<Self>; 3],
        log_sums: &Self::Numbers,
        dy: FloatTensor<Self>,
        widths: Widths,
        spans: &[Span],
        scoring: Scoring,
    ) -> [FloatTensor<Self>; 3];
}

impl<B: Host> AttentionLoops for B {
    fn forward(
        q: FloatTensor<Self>,
        k: &FloatTensor<Self>,
        v: &FloatTensor<Self>,
        widths: Widths,
        spans: &[Span],
        scoring: Scoring,
    ) -> (FloatTensor<Self>, Vec<f32>) {
        B::rewrite(q, |q| tiles::forward(q, [B::numbers(k), B::numbers(v)], widths, spans, scoring))
    }

    fn backward(
        [q, k, v]: [FloatTensor<Self>; 3],
        log_sums: &Vec<f32>,
        dy: FloatTensor<Self>,
        widths: Widths,
        spans: &[Span],
        scoring: Scoring,
    ) -> [FloatTensor<Self>; 3] {
        let dy = B::contiguous(dy);
        let (dq, (dk, (dv, ()))) = B::rewrite(q, |q| {
            B::rewrite(k, |k| {
                B::rewrite(v, |v| {
                    tiles::backward([q, k, v], log_sums, B::numbers(&dy), widths, spans, scoring);
                })
            })
        });
        [dq, dk, dv]
    }
}

fn forward<B: AttentionLoops>(
    q: FloatTensor<B>,
    [k, v]: [&FloatTensor<B>; 2],
    spans: &[Span],
    scoring: Scoring,
) -> (FloatTensor<B>, B::Numbers) {
    let _attention = tracing::trace_span!("attention").entered();
    assert!(k.shape() == v.shape(), "a value for every key");
    let widths = widths::<B>(&q, k);
    B::forward(q, k, v, widths, spans, scoring)
}

fn widths<B: Backend>(q: &FloatTensor<B>, k: &FloatTensor<B>) -> Widths {
    let (q, k) = (q.shape(), k.shape());
    assert!(q[2] == k[2] && q[1].is_multiple_of(k[1]), "heads of one width, as many to each key head");
    Widths { heads: q[1], kv_heads: k[1], dim: q[2] }
}

impl<B: AttentionLoops> Attention for B {
    fn attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        spans: Arc<[Span]>,
        scoring: Scoring,
    ) -> FloatTensor<Self> {
        forward::<B>(q, [&B::contiguous(k), &B::contiguous(v)], &spans, scoring).0
    }
}

impl<B: AttentionLoops, C: CheckpointStrategy> Attention for Autodiff<B, C> {
    fn attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        spans: Arc<[Span]>,
        scoring: Scoring,
    ) -> FloatTensor<Self> {
        let operation = Recorded.prepare::<C>([q.node(), k.node(), v.node()]).compute_bound().stateful();
        let [q, k, v] = [q, k, v].map(|x| B::contiguous(x.into_primitive()));
        match operation {
            OpsKind::Tracked(prep) => {
                let (y, log_sums) = forward::<B>(q.clone(), [&k, &v], &spans, scoring);
                prep.finish(Saved { q, k, v, log_sums, spans, scoring }, y)
            }
            OpsKind::UnTracked(prep) => prep.finish(forward::<B>(q, [&k, &v], &spans, scoring).0),
        }
    }
}

/// What the backward pass needs; no scores.
#[derive(Debug, Clone)]
struct Saved<T, L> {
    q: T,
    k: T,
    v: T,
    /// Of each query and head, the logarithm of its sum of exponentials.
    log_sums: L,
    spans: Arc<[Span]>,
    scoring: Scoring,
}

/// Attention in an autodiff graph.
#[derive(Debug)]
struct Recorded;

impl<B: AttentionLoops> Backward<B, 3> for Recorded {
    type State = Saved<FloatTensor<B>, B::Numbers>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let _attention = tracing::trace_span!("attention").entered();
        let Saved { q, k, v, log_sums, spans, scoring } = ops.state;
        let dy = grads.consume::<B>(&ops.node);
        let widths = widths::<B>(&q, &k);
        let gradients = <B as AttentionLoops>::backward([q, k, v], &log_sums, dy, widths, &spans, scoring);
        for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_cover_rows_without_gaps_and_overlaps() {
        let cache = [Span { queries: 0..2, keys: 0..9 }];
        assert!(cover(&cache, 2, 9));
        assert!(!cover(&cache, 3, 9) && !cover(&cache, 2, 10));
        assert!(cover(&[Span::document(0..2), Span::document(2..5)], 5, 5));
        assert!(!cover(&[Span::document(0..2), Span::document(3..5)], 5, 5));
        assert!(!cover(&[Span { queries: 0..2, keys: 0..4 }, Span { queries: 2..3, keys: 0..5 }], 3, 5));
        assert!(!cover(&[Span { queries: 0..3, keys: 0..2 }], 3, 2));
    }
}
