//! Attention a tile of queries at a time, in the manner of `FlashAttention` (Dao et al. 2022,
//! <https://arxiv.org/abs/2205.14135>): scores exist for one tile only, and the backward pass
//! computes them again from the logarithm of each query's sum of exponentials.
//!
//! A task is one key head and some queries of one span. Its query heads are stacked into taller products. A tile
//! sees all its keys at once, so that nothing is ever rescaled; keys in the future of all its
//! queries, or before the window of all of them, are not looked at.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::Span;
use super::heads::{Own, Part, Shared, fetch};
use super::scoring::{Scoring, cap};
use crate::bf16::BLOCK;
use crate::frozen::wide::widest;
use crate::product::{Matrix, MatrixMut, RightFactor, multiply, turned};
use crate::rewritten::{Rewritten, total};
use crate::softmax::{exponentials, exponentials_below, pull_back};

/// Rows of a tile, its queries times the query heads that share a key head: enough to keep a
/// product busy, few enough that its scores stay in a core's cache.
const ROWS: usize = 96;
/// A tile's keys begin at a multiple of so many, where the tiles of products do.
const KEYS: usize = BLOCK;
/// Queries of a task. A long record has more of them than one, for all cores to have work where heads are few.
const QUERIES: usize = 512;

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
    let all_log_sums = Shared::new(Rewritten::InPlace(&mut log_sums));
    let tasks: Vec<_> = heads(spans, widths, scoring).flat_map(|task| task.split()).collect();
    tasks.into_par_iter().for_each(|task| {
        // SAFETY: tasks have other queries or other heads.
        #[allow(unsafe_code)]
        let (q, log_sums) = unsafe { (q.part(task.queries(dim)), all_log_sums.part(task.queries(1))) };
        Scratch::with(|scratch| task.attend(q, [k, v], log_sums, scratch));
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
    heads(spans, widths, scoring).collect::<Vec<_>>().into_par_iter().for_each(|head| {
        // SAFETY: these are other heads, or spans that are disjoint in keys.
        #[allow(unsafe_code)]
        let (mut k, mut v) = unsafe { (k.part(head.all_keys()), v.part(head.all_keys())) };
        let [keys, values] = [&k, &v].map(|own| {
            let mut numbers = Vec::new();
            own.fetch(head.span.keys.clone(), &mut numbers);
            numbers
        });
        let tasks: Vec<_> = head.split().collect();
        let factors = Factors::new(&keys, &values, dim, scoring);
        let parts = tasks.into_par_iter().map(|task| {
            // SAFETY: tasks have other queries.
            #[allow(unsafe_code)]
            let q = unsafe { q.part(task.queries(dim)) };
            Scratch::with(|scratch| task.pull_back(q, &factors, log_sums, dy, scratch))
        });
        // Collected first: whichever task ends first, they are summed in their order. A part ends with the last key that
        // its queries see.
        let (of_keys, of_values): (Vec<_>, Vec<_>) = parts.collect();
        for (own, parts) in [(&mut k, of_keys), (&mut v, of_values)] {
            own.store(head.span.keys.clone(), &total(parts, keys.len()));
        }
    });
}

/// Queries of a span that look at one key head.
struct Task<'a> {
    span: &'a Span,
    /// Of the span's.
    queries: Range<usize>,
    kv_head: usize,
    widths: Widths,
    scoring: Scoring,
}

/// What the backward pass multiplies by, of the keys of one head.
struct Factors<'a> {
    /// `[keys, dim]`
    keys: RightFactor<'a>,
    /// `[dim, keys]`
    keys_turned: RightFactor<'a>,
    values_turned: RightFactor<'a>,
}

impl<'a> Factors<'a> {
    fn new(keys: &'a [f32], values: &'a [f32], dim: usize, scoring: Scoring) -> Self {
        let [keys, values] = [keys, values].map(|numbers| Matrix::rows(numbers, dim));
        let [keys, keys_turned, values_turned] = [keys, keys.transposed(), values.transposed()]
            .map(|factor| RightFactor::new(factor, scoring.precision));
        Self { keys, keys_turned, values_turned }
    }
}

/// Some queries of a task.
struct Tile {
    /// Their rows.
    queries: Range<usize>,
    /// How many keys are there so far for the first of them.
    so_far: usize,
    /// The keys that any of them sees, counted from the span's first, and less than [`KEYS`] before.
    keys: Range<usize>,
}

/// All queries of each span, for each of its key heads.
fn heads(spans: &[Span], widths: Widths, scoring: Scoring) -> impl Iterator<Item = Task<'_>> {
    spans.iter().flat_map(move |span| {
        let queries = span.queries.clone();
        let task = move |kv_head| Task { span, queries: queries.clone(), kv_head, widths, scoring };
        (0..widths.kv_heads).map(task)
    })
}

impl<'a> Task<'a> {
    /// The same in tasks of fewer queries.
    fn split(&self) -> impl Iterator<Item = Task<'a>> + use<'a> {
        let Task { span, ref queries, kv_head, widths, scoring } = *self;
        let queries = queries.clone();
        queries.clone().step_by(QUERIES).map(move |start| {
            let queries = start..queries.end.min(start + QUERIES);
            Task { span, queries, kv_head, widths, scoring }
        })
    }

    /// `softmax(scores) v` in place of `q`, and the logarithm of each query's sum of exponentials.
    fn attend(&self, mut q: Own, [k, v]: [&[f32]; 2], mut log_sums: Own, scratch: &mut Scratch) {
        let dim = self.widths.dim;
        let Scratch { q: tile_q, scores, caps, products, sums, log_sums: tops, .. } = scratch;
        let (keys, values) = (self.keys(k).transposed(), self.keys(v));
        let [keys, values] = [keys, values].map(|factor| RightFactor::new(factor, self.scoring.precision));
        for tile in self.tiles() {
            q.fetch(tile.queries.clone(), tile_q);
            self.score(tile_q, &keys, tile.keys.clone(), scores, caps);
            sums.clear();
            let rows = self.rows(&tile, scores);
            widest!(|| {
                for (row, sees) in rows {
                    sums.push(exponentials(row, sees));
                }
            });
            let products = resized(products, tile_q.len());
            let weights = Matrix::rows(scores, tile.keys.len());
            values.multiply(weights, tile.keys.clone(), 0..dim, MatrixMut::rows(products, dim), false);
            widest!(|| {
                for (row, (_, sum)) in products.chunks_exact_mut(dim).zip(&*sums) {
                    for x in row {
                        *x /= sum;
                    }
                }
            });
            q.store(tile.queries.clone(), products);
            tops.clear();
            tops.extend(sums.iter().map(|(top, sum)| top + sum.ln()));
            log_sums.store(tile.queries, tops);
        }
    }

    /// The gradient at `q` in its place. Returns those at the span's `keys` and `values`, to the last that is seen.
    fn pull_back(
        &self,
        mut q: Own,
        factors: &Factors,
        log_sums: &[f32],
        dy: &[f32],
        scratch: &mut Scratch,
    ) -> (Vec<f32>, Vec<f32>) {
        let (dim, Scoring { precision, scale: by, .. }) = (self.widths.dim, self.scoring);
        let Scratch {
            q: tile_q, dk, dv, dy: tile_dy, log_sums: tops, scores, caps, slopes, products, ..
        } = scratch;
        let all = self.seen();
        // Both `[dim, keys]`: then the larger factors of all products lie in whole rows.
        for gradient in [&mut *dk, &mut *dv] {
            gradient.clear();
            gradient.resize(all * dim, 0.0);
        }
        for tile in self.tiles() {
            let seen = tile.keys.clone();
            q.fetch(tile.queries.clone(), tile_q);
            fetch(dy, &self.queries(dim).at(tile.queries.clone()), tile_dy);
            fetch(log_sums, &self.queries(1).at(tile.queries.clone()), tops);

            let dy = Matrix::rows(tile_dy, dim);
            self.score(tile_q, &factors.keys_turned, seen.clone(), scores, caps);
            let rows = self.rows(&tile, scores).zip(&*tops);
            widest!(|| {
                for ((row, sees), top) in rows {
                    exponentials_below(row, sees, *top);
                }
            });
            let width = tile.keys.len();
            let of_tile = |gradient| MatrixMut::new(gradient, [dim, width], all);
            let dv = of_tile(&mut dv[tile.keys.start..]);
            multiply(dy.transposed(), Matrix::rows(scores, width), dv, true, precision);
            let slopes = resized(slopes, scores.len());
            factors.values_turned.multiply(dy, 0..dim, seen.clone(), MatrixMut::rows(slopes, width), false);
            let rows = scores.chunks_exact(width).zip(slopes.chunks_exact_mut(width));
            widest!(|| {
                for (weights, slopes) in rows {
                    pull_back(weights, slopes);
                }
            });
            for (slope, cap) in slopes.iter_mut().zip(&*caps) {
                *slope *= cap;
            }
            let slopes = Matrix::rows(slopes, width);
            let dk = of_tile(&mut dk[tile.keys.start..]);
            multiply(Matrix::rows(tile_q, dim).transposed(), slopes, dk, true, precision);
            let products = resized(products, tile_q.len());
            factors.keys.multiply(slopes, seen, 0..dim, MatrixMut::rows(products, dim), false);
            scale(products, by);
            q.store(tile.queries, products);
        }
        (turned(dk, all), turned(dv, all))
    }

    /// Query heads that share the key head.
    fn group(&self) -> usize {
        self.widths.heads / self.widths.kv_heads
    }

    /// The task's queries, or what there are `dim` numbers of for each of their heads.
    fn queries(&self, dim: usize) -> Part {
        let heads = self.kv_head * self.group()..(self.kv_head + 1) * self.group();
        Part { tokens: self.queries.clone(), heads, of: self.widths.heads, dim }
    }

    /// The task's keys, or their values.
    fn all_keys(&self) -> Part {
        let Widths { kv_heads, dim, .. } = self.widths;
        let heads = self.kv_head..self.kv_head + 1;
        Part { tokens: self.span.keys.clone(), heads, of: kv_heads, dim }
    }

    /// The keys that the task's queries see, or their values, where they lie.
    fn keys<'v>(&self, values: &'v [f32]) -> Matrix<'v> {
        let Widths { kv_heads, dim, .. } = self.widths;
        let start = (self.span.keys.start * kv_heads + self.kv_head) * dim;
        Matrix::new(&values[start..], [self.seen(), dim], kv_heads * dim)
    }

    /// How many of the span's keys there are to the last that is seen.
    fn seen(&self) -> usize {
        self.tiles().last().map_or(0, |tile| tile.keys.end)
    }

    fn tiles(&self) -> impl Iterator<Item = Tile> + use<> {
        let (Span { queries: all, keys }, queries) = (self.span.clone(), self.queries.clone());
        let (tokens, scoring) = ((ROWS / self.group()).max(1), self.scoring);
        // The last key belongs to the last query.
        let before = keys.len() - all.len();
        let keys_so_far = move |query: usize| before + query - all.start;
        queries.clone().step_by(tokens).map(move |start| {
            let end = queries.end.min(start + tokens);
            let so_far = keys_so_far(start) + 1;
            let first = scoring.first(so_far) / KEYS * KEYS;
            Tile { queries: start..end, so_far, keys: first..keys_so_far(end) }
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

    /// `scores = q k^T * scale` with some of the keys, which are `[dim, keys]`, capped where they are to be; then `caps`
    /// are the slopes of the cap, otherwise there are none. Scales `q`.
    fn score(
        &self,
        q: &mut [f32],
        keys: &RightFactor,
        seen: Range<usize>,
        scores: &mut Vec<f32>,
        caps: &mut Vec<f32>,
    ) {
        let dim = self.widths.dim;
        scale(q, self.scoring.scale);
        let (rows, tokens) = (q.len() / dim, seen.len());
        let out = MatrixMut::rows(resized(scores, rows * tokens), tokens);
        keys.multiply(Matrix::rows(q, dim), 0..dim, seen, out, false);
        match self.scoring.soft_cap {
            Some(soft_cap) => cap(scores, soft_cap, caps),
            None => caps.clear(),
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

impl Scratch {
    fn with<R>(task: impl FnOnce(&mut Self) -> R) -> R {
        thread_local! {
            static SCRATCH: RefCell<Scratch> = RefCell::default();
        }
        SCRATCH.with_borrow_mut(task)
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp)] // the same arithmetic, and copies
mod tests {
    use super::*;
    use crate::frozen::Precision;
    use crate::rewritten::tests::both_ways;
    use crate::small_numbers;

    /// So many heads that share a key head that there are three queries in a tile.
    const WIDTHS: Widths = Widths { heads: 64, kv_heads: 2, dim: 2 };

    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        small_numbers(count, seed).iter().map(|x| x / 4.0).collect()
    }

    /// What is known of the results without computing them: a query that sees one key alone gets its value and no
    /// gradient, and weights sum to one.
    #[test]
    fn tasks_of_several_spans_tiles_and_heads_replace_their_own() {
        let spans = [0..4, 4..5, 5..6].map(Span::document);
        let Widths { heads, kv_heads, dim } = WIDTHS;
        let (q, k, v) =
            (numbers(6 * heads * dim, 0), numbers(6 * kv_heads * dim, 1), numbers(6 * kv_heads * dim, 2));
        let scoring = Scoring { precision: Precision::F32, ..Scoring::of_heads(dim) };
        let attend = |[q]: [Rewritten; 1]| forward(q, [&k, &v], WIDTHS, &spans, scoring);
        let queries = [q];
        let ([y], log_sums) = both_ways(&queries, attend);
        let [q] = queries;
        let row = |x: &[f32], token: usize, head: usize, of: usize| -> [f32; 2] {
            std::array::from_fn(|i| x[(token * of + head) * dim + i])
        };
        for (token, head) in [0, 4, 5].into_iter().flat_map(|token| (0..heads).map(move |head| (token, head)))
        {
            let value = row(&v, token, head / (heads / kv_heads), kv_heads);
            assert_eq!(row(&y, token, head, heads), value, "token {token}, head {head}");
        }

        let dy = numbers(6 * heads * dim, 3);
        let ([dq, dk, dv], ()) =
            both_ways(&[q, k, v], |numbers| backward(numbers, &log_sums, &dy, WIDTHS, &spans, scoring));
        for head in 0..heads {
            let [dq, dk] = [row(&dq, 4, head, heads), row(&dk, 4, head / (heads / kv_heads), kv_heads)];
            assert!(dq.iter().chain(&dk).all(|x| x.abs() < 1e-6), "head {head}: {dq:?}, {dk:?}");
        }
        let sum = |x: &[f32]| x.iter().copied().map(f64::from).sum::<f64>();
        assert!((sum(&dv) - sum(&dy)).abs() < 1e-3, "{} {}", sum(&dv), sum(&dy));
    }
}
