//! Attention a tile of queries at a time, in the manner of `FlashAttention` (Dao et al. 2022,
//! <https://arxiv.org/abs/2205.14135>): scores exist for one tile only, and the backward pass
//! computes them again from the logarithm of each query's sum of exponentials.
//!
//! A task is one key head in one span. Its query heads are stacked into taller products. A tile
//! sees all its keys at once, so that nothing is ever rescaled; keys in the future of all its
//! queries, or before the window of all of them, are not looked at.

use std::ops::Range;

use rayon::prelude::*;

use super::Span;
use super::heads::{Part, Shared, fetch};
use super::scoring::{Scoring, cap};
use crate::frozen::wide::widest;
use crate::product::{Matrix, multiply};
use crate::rewritten::Rewritten;
use crate::softmax::{exponentials, exponentials_below, pull_back};

/// Rows of a tile, its queries times the query heads that share a key head: enough to keep a
/// product busy, few enough that its scores stay in a core's cache.
const ROWS: usize = 96;

/// How many heads there are, and how wide one is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Widths {
    /// Heads of the queries.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Features of a head.
    pub dim: usize,
}

/// `softmax(scores) v` in place of `q`. Returns the logarithm of each query's sum of
/// exponentials, `[query tokens, heads]`.
///
/// # Shapes
/// - q: `[query tokens, heads, dim]`; k, v: `[key tokens, kv_heads, dim]`
/// - spans: disjoint in queries
pub fn forward(
    q: Rewritten,
    [k, v]: [&[f32]; 2],
    widths: Widths,
    spans: &[Span],
    scoring: Scoring,
) -> Vec<f32> {
    let dim = widths.dim;
    let mut log_sums = vec![0.0; q.len() / dim];
    let q = Shared::new(q);
    let all_log_sums = Shared::new(Rewritten::in_place(&mut log_sums));
    tasks(spans, widths, scoring).into_par_iter().for_each_init(Scratch::default, |scratch, task| {
        // SAFETY: tasks have other spans, disjoint in queries, or other heads.
        #[allow(unsafe_code)]
        let (mut q, mut log_sums) =
            unsafe { (q.part(task.queries(dim)), all_log_sums.part(task.queries(1))) };
        let Scratch { q: tile_q, scores, caps, products, sums, log_sums: tops, .. } = scratch;
        for tile in task.tiles() {
            q.fetch(tile.queries.clone(), tile_q);
            task.score(tile_q, task.keys(k, &tile), scores, caps);
            sums.clear();
            let rows = task.rows(&tile, scores);
            widest(|| sums.extend(rows.map(|(row, sees)| exponentials(row, sees))));
            let products = resized(products, tile_q.len());
            multiply(Matrix::rows(scores, tile.keys.len()), task.keys(v, &tile), products, false);
            for (row, (_, sum)) in products.chunks_exact_mut(dim).zip(&*sums) {
                for x in row {
                    *x /= sum;
                }
            }
            q.store(tile.queries.clone(), products);
            tops.clear();
            tops.extend(sums.iter().map(|(top, sum)| top + sum.ln()));
            log_sums.store(tile.queries, tops);
        }
    });
    log_sums
}

/// The gradients at `q`, `k` and `v`, each in its place, from the `log_sums` of [`forward`].
///
/// With `P` the softmax and `S` the scores, before they are capped: `dV = P^T dO`, `dP = dO V^T`,
/// `dS = P * (dP - sum(P * dP))`, times the slope of the cap, `dQ = dS K * scale`,
/// `dK = dS^T Q * scale`.
///
/// # Shapes
/// - as for [`forward`], `dy` as its result
/// - spans: disjoint in queries and in keys
pub fn backward(
    numbers: [Rewritten; 3],
    log_sums: &[f32],
    dy: &[f32],
    widths: Widths,
    spans: &[Span],
    scoring: Scoring,
) {
    let dim = widths.dim;
    let [q, k, v] = numbers.map(Shared::new);
    tasks(spans, widths, scoring).into_par_iter().for_each_init(Scratch::default, |scratch, task| {
        // SAFETY: tasks have other spans, disjoint in queries and in keys, or other heads.
        #[allow(unsafe_code)]
        let (mut q, mut k, mut v) =
            unsafe { (q.part(task.queries(dim)), k.part(task.all_keys()), v.part(task.all_keys())) };
        let Scratch { q: tile_q, k: keys, v: values, dk, dv, dy: tile_dy, log_sums: tops, .. } = scratch;
        let Scratch { scores, caps, slopes, products, .. } = scratch;
        k.fetch(task.span.keys.clone(), keys);
        v.fetch(task.span.keys.clone(), values);
        for gradient in [&mut *dk, &mut *dv] {
            gradient.clear();
            gradient.resize(keys.len(), 0.0);
        }
        for tile in task.tiles() {
            let seen = tile.keys.start * dim..tile.keys.end * dim;
            q.fetch(tile.queries.clone(), tile_q);
            fetch(dy, &task.queries(dim).at(tile.queries.clone()), tile_dy);
            fetch(log_sums, &task.queries(1).at(tile.queries.clone()), tops);
            let [keys, values] = [&keys, &values].map(|all| Matrix::rows(&all[seen.clone()], dim));

            let dy = Matrix::rows(tile_dy, dim);
            task.score(tile_q, keys, scores, caps);
            let rows = task.rows(&tile, scores).zip(&*tops);
            widest(|| rows.for_each(|((row, sees), top)| _ = exponentials_below(row, sees, *top)));
            let width = tile.keys.len();
            multiply(Matrix::rows(scores, width).transposed(), dy, &mut dv[seen.clone()], true);
            let slopes = resized(slopes, scores.len());
            multiply(dy, values.transposed(), slopes, false);
            let rows = scores.chunks_exact(width).zip(slopes.chunks_exact_mut(width));
            widest(|| rows.for_each(|(weights, slopes)| pull_back(weights, slopes)));
            for (slope, cap) in slopes.iter_mut().zip(&*caps) {
                *slope *= cap;
            }
            let slopes = Matrix::rows(slopes, width);
            multiply(slopes.transposed(), Matrix::rows(tile_q, dim), &mut dk[seen], true);
            let products = resized(products, tile_q.len());
            multiply(slopes, keys, products, false);
            scale(products, scoring.scale);
            q.store(tile.queries, products);
        }
        k.store(task.span.keys.clone(), dk);
        v.store(task.span.keys.clone(), dv);
    });
}

/// The work of one task.
#[derive(Clone)]
struct Task<'a> {
    span: &'a Span,
    kv_head: usize,
    widths: Widths,
    scoring: Scoring,
}

/// Some queries of a task.
struct Tile {
    /// Their rows.
    queries: Range<usize>,
    /// How many keys are there so far for the first of them.
    so_far: usize,
    /// The keys that any of them sees, counted from the span's first.
    keys: Range<usize>,
}

fn tasks(spans: &[Span], widths: Widths, scoring: Scoring) -> Vec<Task<'_>> {
    let heads = |span| (0..widths.kv_heads).map(move |kv_head| Task { span, kv_head, widths, scoring });
    spans.iter().flat_map(heads).collect()
}

impl Task<'_> {
    /// Query heads that share the key head.
    fn group(&self) -> usize {
        self.widths.heads / self.widths.kv_heads
    }

    /// The task's queries, or what there are `dim` numbers of for each of their heads.
    fn queries(&self, dim: usize) -> Part {
        let heads = self.kv_head * self.group()..(self.kv_head + 1) * self.group();
        Part { tokens: self.span.queries.clone(), heads, of: self.widths.heads, dim }
    }

    /// The task's keys, or their values.
    fn all_keys(&self) -> Part {
        let Widths { kv_heads, dim, .. } = self.widths;
        let heads = self.kv_head..self.kv_head + 1;
        Part { tokens: self.span.keys.clone(), heads, of: kv_heads, dim }
    }

    /// The keys that `tile` sees, or their values, where they lie.
    fn keys<'v>(&self, values: &'v [f32], tile: &Tile) -> Matrix<'v> {
        let Widths { kv_heads, dim, .. } = self.widths;
        let start = ((self.span.keys.start + tile.keys.start) * kv_heads + self.kv_head) * dim;
        Matrix::new(&values[start..], [tile.keys.len(), dim], kv_heads * dim)
    }

    fn tiles(&self) -> impl Iterator<Item = Tile> + use<> {
        let Span { queries, keys } = self.span.clone();
        let (tokens, scoring) = ((ROWS / self.group()).max(1), self.scoring);
        // The last key belongs to the last query.
        let before = keys.len() - queries.len();
        (0..queries.len()).step_by(tokens).map(move |start| {
            let end = queries.len().min(start + tokens);
            let rows = queries.start + start..queries.start + end;
            let so_far = before + start + 1;
            Tile { queries: rows, so_far, keys: scoring.first(so_far)..before + end }
        })
    }

    /// Each row of a tile's scores, with those of the tile's keys that it sees.
    fn rows<'s>(
        &self,
        tile: &Tile,
        scores: &'s mut [f32],
    ) -> impl Iterator<Item = (&'s mut [f32], Range<usize>)> + use<'s> {
        let (group, scoring, so_far, first) = (self.group(), self.scoring, tile.so_far, tile.keys.start);
        let rows = scores.chunks_exact_mut(tile.keys.len()).enumerate();
        rows.map(move |(row, scores)| {
            let so_far = so_far + row / group;
            (scores, scoring.first(so_far) - first..so_far - first)
        })
    }

    /// `scores = q k^T * scale`, capped where they are to be; then `caps` are the slopes of the cap,
    /// otherwise they stay empty. Scales `q`.
    fn score(&self, q: &mut [f32], keys: Matrix, scores: &mut Vec<f32>, caps: &mut Vec<f32>) {
        let [tokens, dim] = keys.shape();
        scale(q, self.scoring.scale);
        let rows = q.len() / dim;
        multiply(Matrix::rows(q, dim), keys.transposed(), resized(scores, rows * tokens), false);
        if let Some(soft_cap) = self.scoring.soft_cap {
            cap(scores, soft_cap, caps);
        }
    }
}

fn scale(values: &mut [f32], scale: f32) {
    for x in values {
        *x *= scale;
    }
}

/// `length` numbers to be overwritten.
fn resized(values: &mut Vec<f32>, length: usize) -> &mut [f32] {
    values.resize(length, 0.0);
    values
}

/// What a task computes in, kept for the thread's next one.
#[derive(Default)]
struct Scratch {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
    dy: Vec<f32>,
    log_sums: Vec<f32>,
    sums: Vec<(f32, f32)>,
    scores: Vec<f32>,
    caps: Vec<f32>,
    slopes: Vec<f32>,
    products: Vec<f32>,
}
