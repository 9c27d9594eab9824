use pronk_kernels::{Span, attention};

use crate::reference::{Input, check};

/// Heads, key heads and the width of a head.
#[derive(Clone, Copy)]
struct Heads {
    q: usize,
    kv: usize,
    dim: usize,
}

/// One query, head and key at a time.
fn reference(q: &[f64], k: &[f64], v: &[f64], heads: Heads, spans: &[Span]) -> Vec<f64> {
    let Heads { q: n_heads, kv, dim } = heads;
    let row = |x: &[f64], token: usize, head: usize, of: usize| -> Vec<f64> {
        x[(token * of + head) * dim..][..dim].to_vec()
    };
    let mut out = Vec::new();
    for span in spans {
        // The last key belongs to the last query.
        let before = span.keys.len() - span.queries.len();
        for (i, query) in span.queries.clone().enumerate() {
            let seen = span.keys.start..=span.keys.start + before + i;
            for head in 0..n_heads {
                let shared = head / (n_heads / kv);
                let a = row(q, query, head, n_heads);
                let score = |key| {
                    let b = row(k, key, shared, kv);
                    (a.iter().zip(&b).map(|(a, b)| a * b).sum::<f64>() / (dim as f64).sqrt()).exp()
                };
                let scores: Vec<f64> = seen.clone().map(score).collect();
                let total: f64 = scores.iter().sum();
                for d in 0..dim {
                    let sum: f64 = seen.clone().zip(&scores).map(|(t, s)| s * row(v, t, shared, kv)[d]).sum();
                    out.push(sum / total);
                }
            }
        }
    }
    out
}

fn check_spans(what: &str, heads: Heads, spans: &[Span]) {
    let queries = spans.iter().map(|span| span.queries.end).max().unwrap();
    let keys = spans.iter().map(|span| span.keys.end).max().unwrap();
    let inputs = [
        Input::random([queries, heads.q, heads.dim], 1).scaled(3.0),
        Input::random([keys, heads.kv, heads.dim], 2).scaled(3.0),
        Input::random([keys, heads.kv, heads.dim], 3),
    ];
    let operation = |x: &[burn::tensor::Tensor<3>]| attention(&x[0], &x[1], &x[2], spans);
    check(what, &inputs, operation, |x| reference(&x[0], &x[1], &x[2], heads, spans));
}

#[test]
fn several_documents_with_grouped_queries() {
    let spans = [0..5, 5..6, 6..13].map(Span::document);
    check_spans("attention, 6 heads on 2", Heads { q: 6, kv: 2, dim: 5 }, &spans);
}

#[test]
fn one_document_with_all_heads_on_one_and_each_on_its_own() {
    let spans = [Span::document(0..7)];
    check_spans("attention, 3 heads on 1", Heads { q: 3, kv: 1, dim: 3 }, &spans);
    check_spans("attention, 3 heads on 3", Heads { q: 3, kv: 3, dim: 7 }, &spans);
}

#[test]
fn new_tokens_behind_a_cache() {
    let heads = Heads { q: 4, kv: 2, dim: 3 };
    check_spans("attention, 3 new tokens", heads, &[Span { queries: 0..3, keys: 0..9 }]);
    check_spans("attention, 1 new token", heads, &[Span { queries: 0..1, keys: 0..9 }]);
}
