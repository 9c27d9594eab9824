use burn::tensor::Tensor;
use pronk_kernels::{Precision, Scoring, Span, Tracked, attention, pull_back};

use crate::reference::{Input, assert_close, check, devices, dot, host, numbers};

/// Heads, key heads and the width of a head.
#[derive(Clone, Copy)]
struct Heads {
    q: usize,
    kv: usize,
    dim: usize,
}

/// One query, head and key at a time.
fn reference([q, k, v]: [&[f64]; 3], heads: Heads, spans: &[Span], scoring: Scoring) -> Vec<f64> {
    let Heads { q: n_heads, kv, dim } = heads;
    let Scoring { scale, soft_cap, window, .. } = scoring;
    let capped = |score: f64| soft_cap.map(f64::from).map_or(score, |cap| cap * (score / cap).tanh());
    let row = |token: usize, head: usize, of: usize| (token * of + head) * dim..(token * of + head + 1) * dim;
    let mut out = Vec::new();
    for span in spans {
        // The last key belongs to the last query.
        let before = span.keys.len() - span.queries.len();
        for (i, query) in span.queries.clone().enumerate() {
            let own = span.keys.start + before + i;
            let first = window.map_or(0, |window| (own + 1).saturating_sub(window));
            let seen = first.max(span.keys.start)..=own;
            for head in 0..n_heads {
                let shared = head / (n_heads / kv);
                let a = &q[row(query, head, n_heads)];
                let score = |key| capped(dot(a, &k[row(key, shared, kv)]) * f64::from(scale)).exp();
                let scores: Vec<f64> = seen.clone().map(score).collect();
                let total: f64 = scores.iter().sum();
                let mut sums = vec![0.0; dim];
                for (key, score) in seen.clone().zip(&scores) {
                    sums.iter_mut().zip(&v[row(key, shared, kv)]).for_each(|(sum, v)| *sum += score * v);
                }
                out.extend(sums.iter().map(|sum| sum / total));
            }
        }
    }
    out
}

fn inputs(heads: Heads, spans: &[Span]) -> [Input<3>; 3] {
    let queries = spans.iter().map(|span| span.queries.end).max().unwrap();
    let keys = spans.iter().map(|span| span.keys.end).max().unwrap();
    [
        Input::random([queries, heads.q, heads.dim], 1).scaled(3.0),
        Input::random([keys, heads.kv, heads.dim], 2).scaled(3.0),
        Input::random([keys, heads.kv, heads.dim], 3),
    ]
}

fn check_spans(what: &str, heads: Heads, spans: &[Span]) {
    check_scoring(what, heads, spans, Scoring::of_heads(heads.dim));
}

fn check_scoring(what: &str, heads: Heads, spans: &[Span], scoring: Scoring) {
    let operation = |x: &[Tensor<3>]| attention(x[0].clone(), &x[1], &x[2], spans, scoring);
    let expected = |x: &[Vec<f64>]| reference([&x[0], &x[1], &x[2]], heads, spans, scoring);
    check(what, &inputs(heads, spans), operation, expected);
}

/// For shapes with too many numbers for a slope at each: the result, and the slope along random
/// directions.
fn check_large_spans(what: &str, heads: Heads, spans: &[Span], scoring: Scoring) {
    let inputs = inputs(heads, spans);
    let values = inputs.each_ref().map(|input| input.values.clone());
    let answer = |x: &[Vec<f64>; 3]| reference(x.each_ref().map(Vec::as_slice), heads, spans, scoring);
    let expected = answer(&values);
    let weights = numbers(expected.len(), 99);
    let directions = inputs.each_ref().map(|input| numbers(input.values.len(), 7));
    let slopes: Vec<f64> = (0..3)
        .map(|i| {
            let loss = |step: &[f64]| {
                let mut x = values.clone();
                x[i].iter_mut().zip(&directions[i]).for_each(|(x, u)| *x += step[0] * u);
                dot(&answer(&x), &weights)
            };
            crate::reference::slopes(loss, &[0.0])[0]
        })
        .collect();
    for (name, device) in devices() {
        let leaves = inputs.each_ref().map(|input| input.on(&device).tracked());
        let output = attention(leaves[0].clone(), &leaves[1], &leaves[2], spans, scoring);
        assert_close(&format!("{what} on {name}"), &host(&output), &expected);
        let weights = Input { values: weights.clone(), shape: output.dims() }.on(&device);
        let gradients = pull_back(&output, weights);
        let found: Vec<f64> = leaves
            .iter()
            .zip(&directions)
            .map(|(leaf, direction)| dot(&host(&leaf.grad(&gradients).unwrap()), direction))
            .collect();
        assert_close(&format!("{what} on {name}, slopes"), &found, &slopes);
    }
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

#[test]
fn one_token_and_odd_sizes() {
    // A token that sees itself alone has no slope; the other documents' tell how small that is.
    let spans = [0..1, 1..3, 3..4].map(Span::document);
    check_spans("attention, 1 token", Heads { q: 3, kv: 1, dim: 6 }, &spans);
    check_spans("attention, 6 features", Heads { q: 3, kv: 1, dim: 6 }, &[0..4, 4..15].map(Span::document));
}

#[test]
fn long_documents_in_several_tiles_blocks_and_tasks() {
    let spans = [0..1040, 1040..1041, 1041..1080].map(Span::document);
    for (q, kv, dim) in [(9, 3, 64), (2, 2, 6)] {
        let what = format!("attention, 1040 tokens, {q} heads on {kv}");
        check_large_spans(&what, Heads { q, kv, dim }, &spans, Scoring::of_heads(dim));
    }
}

#[test]
fn many_new_tokens_behind_a_cache() {
    let spans = [Span { queries: 0..130, keys: 0..201 }];
    let heads = Heads { q: 4, kv: 2, dim: 16 };
    check_large_spans("attention, 130 new tokens", heads, &spans, Scoring::of_heads(16));
}

/// Every combination of a scale, a cap and a window, the last of them wider than any record.
#[test]
fn scores_of_every_kind() {
    let spans = [0..5, 5..6, 6..13].map(Span::document);
    let cache = [Span { queries: 0..3, keys: 0..9 }];
    let heads = Heads { q: 4, kv: 2, dim: 3 };
    for soft_cap in [None, Some(1.5)] {
        for window in [None, Some(2), Some(4), Some(100)] {
            for scale in [0.25, 1.0] {
                let scoring = Scoring { scale, soft_cap, window, ..Scoring::of_heads(1) };
                check_scoring(&format!("attention, {scoring:?}"), heads, &spans, scoring);
                check_scoring(&format!("attention, cache, {scoring:?}"), heads, &cache, scoring);
            }
        }
    }
}

/// No slopes to compare here: a query that sees itself alone passes no gradient to its score.
#[test]
fn a_window_of_one_token_copies_its_value() {
    let spans = [Span::document(0..5)];
    let scoring = Scoring { window: Some(1), ..Scoring::of_heads(2) };
    for (_, device) in devices() {
        let [q, k, v] = inputs(Heads { q: 1, kv: 1, dim: 2 }, &spans).map(|input| input.on(&device));
        assert_eq!(host(&attention(q, &k, &v, &spans, scoring)), host(&v));
    }
}

#[test]
fn windows_and_caps_over_several_tiles_blocks_and_tasks() {
    let spans = [0..600, 600..601, 601..640].map(Span::document);
    let cache = [Span { queries: 0..130, keys: 0..201 }];
    let heads = Heads { q: 4, kv: 2, dim: 16 };
    for (soft_cap, window) in [(None, Some(7)), (None, Some(100)), (Some(2.0), Some(60)), (Some(2.0), None)] {
        let scoring = Scoring { scale: 0.3, soft_cap, window, ..Scoring::of_heads(1) };
        check_large_spans(&format!("attention, 600 tokens, {scoring:?}"), heads, &spans, scoring);
        check_large_spans(&format!("attention, 130 new tokens, {scoring:?}"), heads, &cache, scoring);
    }
}

#[test]
fn spans_may_leave_rows_out_and_share_them() {
    let heads = Heads { q: 2, kv: 1, dim: 3 };
    check_spans("attention, a gap", heads, &[0..3, 4..6].map(Span::document));
    let prompt = [Span { queries: 0..2, keys: 0..5 }, Span { queries: 2..4, keys: 0..6 }];
    check_spans("attention, shared keys", heads, &prompt);
}

/// In bf16, factors are rounded to some 1/256 of themselves; whatever is summed stays float32.
#[test]
fn rounded_products_stay_near() {
    let spans = [0..1100, 1100..1101, 1101..1140].map(Span::document);
    let cache = [Span { queries: 0..130, keys: 0..201 }];
    for (q, kv, dim) in [(3, 1, 64), (2, 2, 20)] {
        for (spans, window) in [(&spans[..], None), (&spans[..], Some(100)), (&cache[..], None)] {
            let exact = Scoring { window, ..Scoring::of_heads(dim) };
            let rounded = Scoring { precision: Precision::Bf16, ..exact };
            let inputs = inputs(Heads { q, kv, dim }, spans);
            for (name, device) in devices() {
                let [expected, found] = [exact, rounded].map(|scoring| {
                    let leaves = inputs.each_ref().map(|input| input.on(&device).tracked());
                    let y = attention(leaves[0].clone(), &leaves[1], &leaves[2], spans, scoring);
                    let weights =
                        Input { values: numbers(y.shape().num_elements(), 99), shape: y.dims() }.on(&device);
                    let gradients = pull_back(&y, weights);
                    let gradients = leaves.map(|leaf| host(&leaf.grad(&gradients).unwrap()));
                    [host(&y)].into_iter().chain(gradients).collect::<Vec<_>>()
                });
                for (expected, found) in expected.iter().zip(&found) {
                    let error: Vec<f64> = expected.iter().zip(found).map(|(x, y)| x - y).collect();
                    let far = (dot(&error, &error) / dot(expected, expected)).sqrt();
                    assert!(far < 0.02, "{name}, {q} heads of {dim}, window {window:?}: {far}");
                }
            }
        }
    }
}
