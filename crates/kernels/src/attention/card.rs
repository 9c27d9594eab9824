//! Attention on CubeCL's graphics cards: the products are the card's, on padded pieces of about one length; between
//! them a plane takes a row of scores. The backward pass computes the weights again.

// What `cube` makes of a function is documented by the function.
#![allow(missing_docs)]
// CubeCL reads these functions as text: it wants `x = x + y`, plain numbers and values as they are.
#![allow(clippy::pedantic, clippy::style, clippy::complexity)]

use burn::backend::ops::{FloatTensorOps, IntTensorOps};
use burn::backend::{Cube, TensorMetadata};
use burn::tensor::{DType, TensorData};
use burn_cubecl::cubecl;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::buckets::{Bucket, buckets};
use super::{AttentionLoops, Scoring, Span, Widths};
use crate::card::{
    addresses, element, elements, empty, factor_type, is_alone, lanes, max_of_plane, multiply, planes,
    row_of_plane, sum_of_plane, unit_of_plane,
};

impl AttentionLoops for Cube {
    fn forward(
        q: CubeTensor,
        k: &CubeTensor,
        v: &CubeTensor,
        widths: Widths,
        spans: &[Span],
        scoring: Scoring,
    ) -> (CubeTensor, CubeTensor) {
        let q = into_contiguous(q);
        let log_sums = empty(&q, [q.shape()[0], widths.heads], DType::F32);
        let y = empty(&q, q.shape(), DType::F32);
        for bucket in buckets(spans, widths.heads) {
            let heads = Heads::of(&q, &bucket, widths, scoring);
            let [q, k, v] = [heads.queries(&q), heads.keys(k), heads.keys(v)];
            let scores = multiply(q, Cube::float_swap_dims(k, 1, 2));
            let weights = heads.weights(scores, &log_sums);
            heads.put_queries(multiply(weights, v), &y);
        }
        (y, log_sums)
    }

    fn backward(
        [q, k, v]: [CubeTensor; 3],
        log_sums: &CubeTensor,
        dy: CubeTensor,
        widths: Widths,
        spans: &[Span],
        scoring: Scoring,
    ) -> [CubeTensor; 3] {
        let dy = into_contiguous(dy);
        let dq = empty(&q, q.shape(), DType::F32);
        let [dk, dv] = [&k, &v].map(|x| Cube::float_zeros(x.shape(), &x.device, DType::F32.into()));
        for bucket in buckets(spans, widths.heads) {
            let heads = Heads::of(&q, &bucket, widths, scoring);
            let [q, dy] = [&q, &dy].map(|x| heads.queries(x));
            let [k, v] = [&k, &v].map(|x| heads.keys(x));
            let scores = multiply(q.clone(), Cube::float_swap_dims(k.clone(), 1, 2));
            let at_weights = multiply(dy.clone(), Cube::float_swap_dims(v, 1, 2));
            let (weights, at_scores) = heads.weights_and_slopes(scores, at_weights, log_sums);
            heads.add_keys(multiply(Cube::float_swap_dims(weights, 1, 2), dy), &dv);
            heads.add_keys(multiply(Cube::float_swap_dims(at_scores.clone(), 1, 2), q), &dk);
            heads.put_queries(multiply(at_scores, k), &dq);
        }
        [dq, dk, dv]
    }
}

/// The heads of a bucket.
struct Heads<'a> {
    bucket: &'a Bucket,
    /// Of each piece: where its queries begin and how many there are, and the same of its keys.
    places: CubeTensor,
    widths: Widths,
    factors: DType,
    scoring: Scoring,
}

impl<'a> Heads<'a> {
    fn of(q: &CubeTensor, bucket: &'a Bucket, widths: Widths, scoring: Scoring) -> Self {
        let numbers = bucket.pieces.iter().flat_map(|piece| [piece.queries, piece.keys].concat());
        let numbers: Vec<i32> = numbers.map(|number| number as i32).collect();
        let data = TensorData::new(numbers, [bucket.pieces.len() * 4]);
        Self {
            bucket,
            places: Cube::int_from_data(data, &q.device),
            widths,
            factors: factor_type(scoring.precision, &q.client),
            scoring,
        }
    }

    /// `[pieces * kv_heads, group * queries, dim]`
    fn queries(&self, x: &CubeTensor) -> CubeTensor {
        self.laid_out(x, self.widths.heads, self.bucket.queries, false)
    }

    /// `[pieces * kv_heads, keys, dim]`
    fn keys(&self, x: &CubeTensor) -> CubeTensor {
        self.laid_out(x, self.widths.kv_heads, self.bucket.keys, true)
    }

    fn laid_out(&self, x: &CubeTensor, heads: usize, rows: usize, keys: bool) -> CubeTensor {
        let batch = self.bucket.pieces.len() * self.widths.kv_heads;
        let out = empty(x, [batch, heads / self.widths.kv_heads * rows, self.widths.dim], self.factors);
        let lanes = lanes(self.widths.dim);
        let vectors = out.shape().num_elements() / lanes;
        let (count, dim) = elements(&x.client, vectors);
        // SAFETY: a unit writes one of the `vectors` vectors of `out`, and reads one of the rows that the spans name.
        #[allow(unsafe_code)]
        unsafe {
            lay_out::launch_unchecked(
                &x.client,
                count,
                dim,
                addresses(&[x, &out]),
                lanes,
                x.clone().into_buffer_arg(),
                self.places.clone().into_buffer_arg(),
                out.clone().into_buffer_arg(),
                vectors,
                heads,
                rows,
                self.widths.dim / lanes,
                keys,
                self.types(),
            );
        }
        out
    }

    /// `x`, as [`Self::queries`] lays it out, in the rows of `all`.
    fn put_queries(&self, x: CubeTensor, all: &CubeTensor) {
        self.put(x, all, self.widths.heads, self.bucket.queries, false);
    }

    /// `x`, as [`Self::keys`] lays it out, added to the rows of `all`.
    fn add_keys(&self, x: CubeTensor, all: &CubeTensor) {
        self.put(x, all, self.widths.kv_heads, self.bucket.keys, true);
    }

    fn put(&self, x: CubeTensor, all: &CubeTensor, heads: usize, rows: usize, keys: bool) {
        let lanes = lanes(self.widths.dim);
        let vectors = x.shape().num_elements() / lanes;
        let (count, dim) = elements(&all.client, vectors);
        // SAFETY: a unit reads one of the `vectors` vectors of `x`, and writes to a row that a span names; no two
        // pieces of a bucket have a row in common.
        #[allow(unsafe_code)]
        unsafe {
            put_back::launch_unchecked(
                &all.client,
                count,
                dim,
                addresses(&[all, &x]),
                lanes,
                x.into_buffer_arg(),
                self.places.clone().into_buffer_arg(),
                all.clone().into_buffer_arg(),
                vectors,
                heads,
                rows,
                self.widths.dim / lanes,
                keys,
                element(self.places.dtype),
            );
        }
    }

    /// The softmax of every row of scores, and in `log_sums` the logarithm of its sum of exponentials.
    fn weights(&self, scores: CubeTensor, log_sums: &CubeTensor) -> CubeTensor {
        let weights = empty(&scores, scores.shape(), self.factors);
        let rows = self.rows();
        let lanes = lanes(self.bucket.keys);
        let (count, dim) = planes(&scores.client, rows);
        // SAFETY: a plane reads and writes a row of scores, of which there are `rows`, and the place of its query.
        #[allow(unsafe_code)]
        unsafe {
            weigh::launch_unchecked(
                &scores.client.clone(),
                count,
                dim,
                addresses(&[&scores, log_sums]),
                lanes,
                scores.into_buffer_arg(),
                self.places.clone().into_buffer_arg(),
                weights.clone().into_buffer_arg(),
                log_sums.clone().into_buffer_arg(),
                rows,
                self.widths.heads,
                self.bucket.queries,
                self.bucket.keys / lanes,
                self.scoring.scale,
                self.scoring.soft_cap.unwrap_or(1.0),
                self.scoring.window.unwrap_or(0),
                self.scoring.soft_cap.is_some(),
                is_alone(&weights.client),
                self.types(),
            );
        }
        weights
    }

    /// The softmax again, and the gradient at the scores' products from that at the weights.
    fn weights_and_slopes(
        &self,
        scores: CubeTensor,
        at_weights: CubeTensor,
        log_sums: &CubeTensor,
    ) -> (CubeTensor, CubeTensor) {
        let like = || empty(&scores, scores.shape(), self.factors);
        let (weights, slopes) = (like(), like());
        let rows = self.rows();
        let lanes = lanes(self.bucket.keys);
        let (count, dim) = planes(&scores.client, rows);
        // SAFETY: as above.
        #[allow(unsafe_code)]
        unsafe {
            pull_back::launch_unchecked(
                &scores.client.clone(),
                count,
                dim,
                addresses(&[&scores, log_sums]),
                lanes,
                scores.into_buffer_arg(),
                at_weights.into_buffer_arg(),
                self.places.clone().into_buffer_arg(),
                log_sums.clone().into_buffer_arg(),
                weights.clone().into_buffer_arg(),
                slopes.clone().into_buffer_arg(),
                rows,
                self.widths.heads,
                self.bucket.queries,
                self.bucket.keys / lanes,
                self.scoring.scale,
                self.scoring.soft_cap.unwrap_or(1.0),
                self.scoring.window.unwrap_or(0),
                self.scoring.soft_cap.is_some(),
                is_alone(&weights.client),
                self.types(),
            );
        }
        (weights, slopes)
    }

    /// Rows of scores.
    fn rows(&self) -> usize {
        self.bucket.pieces.len() * self.widths.heads * self.bucket.queries
    }

    fn types(&self) -> [ElemType; 2] {
        [self.factors, self.places.dtype].map(element)
    }
}

/// Where a padded row of a head comes from: the first row of its piece, and how many there are. `keys` are
/// counted behind the queries.
#[cube]
fn piece<I: Int>(places: &[I], number: usize, #[comptime] keys: bool) -> (usize, usize) {
    let at = number * 4 + comptime![if keys { 2usize } else { 0usize }];
    (usize::cast_from(places[at]), usize::cast_from(places[at + 1]))
}

/// Rows of `[tokens, heads, dim]` to `[pieces, heads, rows, dim]`, zeros behind the last of a piece.
#[cube(launch_unchecked, address_type = "dynamic")]
fn lay_out<F: Float, I: Int, N: Size>(
    x: &[Vector<f32, N>],
    places: &[I],
    out: &mut [Vector<F, N>],
    vectors: usize,
    heads: usize,
    rows: usize,
    dim: usize,
    #[comptime] keys: bool,
    #[define(F, I)] _types: [ElemType; 2],
) {
    if ABSOLUTE_POS >= vectors {
        terminate!();
    }
    let (row, feature) = (ABSOLUTE_POS / dim, ABSOLUTE_POS % dim);
    let (i, head) = (row % rows, row / rows % heads);
    let (first, length) = piece::<I>(places, row / rows / heads, keys);
    let mut numbers = Vector::<F, N>::new(F::new(0.0));
    if i < length {
        numbers = Vector::cast_from(x[((first + i) * heads + head) * dim + feature]);
    }
    out[ABSOLUTE_POS] = numbers;
}

/// The way back: what is behind the last row of a piece is left out. `keys` are added, as other pieces see them too.
#[cube(launch_unchecked, address_type = "dynamic")]
fn put_back<I: Int, N: Size>(
    x: &[Vector<f32, N>],
    places: &[I],
    all: &mut [Vector<f32, N>],
    vectors: usize,
    heads: usize,
    rows: usize,
    dim: usize,
    #[comptime] keys: bool,
    #[define(I)] _type: ElemType,
) {
    if ABSOLUTE_POS >= vectors {
        terminate!();
    }
    let (row, feature) = (ABSOLUTE_POS / dim, ABSOLUTE_POS % dim);
    let (i, head) = (row % rows, row / rows % heads);
    let (first, length) = piece::<I>(places, row / rows / heads, keys);
    if i < length {
        let at = ((first + i) * heads + head) * dim + feature;
        if comptime![keys] {
            all[at] = all[at] + x[ABSOLUTE_POS];
        } else {
            all[at] = x[ABSOLUTE_POS];
        }
    }
}

/// The keys that the query of a row sees, and where its head's number lies among `[tokens, heads]`. A row behind the
/// last of its piece sees none.
#[cube]
fn seen<I: Int>(
    places: &[I],
    row: usize,
    heads: usize,
    queries: usize,
    window: usize,
) -> (usize, usize, usize) {
    let (i, head, number) = (row % queries, row / queries % heads, row / queries / heads);
    let (first_query, query_count) = piece::<I>(places, number, false);
    let (_, key_count) = piece::<I>(places, number, true);
    let mut end = 0usize.runtime();
    let mut first = 0usize.runtime();
    if i < query_count {
        end = key_count - query_count + i + 1;
        if window > 0 && end > window {
            first = end - window;
        }
    }
    (first, end, (first_query + i) * heads + head)
}

/// A score from the product of query and key, and its slope there.
#[cube]
fn score(product: f32, scale: f32, cap: f32, #[comptime] capped: bool) -> (f32, f32) {
    let score = product * scale;
    if comptime![capped] {
        let tanh = (score / cap).tanh();
        (cap * tanh, (1.0f32 - tanh * tanh) * scale)
    } else {
        (score, scale)
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn weigh<F: Float, I: Int, N: Size>(
    products: &[Vector<f32, N>],
    places: &[I],
    weights: &mut [Vector<F, N>],
    log_sums: &mut [f32],
    rows: usize,
    heads: usize,
    queries: usize,
    vectors: usize,
    scale: f32,
    cap: f32,
    window: usize,
    #[comptime] capped: bool,
    #[comptime] alone: bool,
    #[define(F, I)] _types: [ElemType; 2],
) {
    let row = row_of_plane();
    if row >= rows {
        terminate!();
    }
    let (first, end, at) = seen::<I>(places, row, heads, queries, window);
    let (unit, units) = unit_of_plane();
    let start = row * vectors;
    let lanes = products[start].vector_size();
    let (from, to) = (first / lanes, (end + lanes - 1) / lanes);
    let mut top = 0.0f32 - 3.0e38f32.runtime();
    for i in range_stepped(from + unit, to, units) {
        let products = products[start + i];
        #[unroll]
        for lane in 0..lanes {
            let key = i * lanes + lane;
            let (score, _) = score(products.extract(lane), scale, cap, capped);
            top = select(key >= first && key < end, top.max(score), top);
        }
    }
    let top = max_of_plane(top, alone);
    let mut sum = 0.0f32.runtime();
    for i in range_stepped(from + unit, to, units) {
        let products = products[start + i];
        #[unroll]
        for lane in 0..lanes {
            let key = i * lanes + lane;
            let (score, _) = score(products.extract(lane), scale, cap, capped);
            sum += select(key >= first && key < end, (score - top).exp(), 0.0f32);
        }
    }
    let sum = sum_of_plane(sum, alone);
    let share = 1.0f32 / sum;
    for i in range_stepped(unit, vectors, units) {
        let products = products[start + i];
        let mut numbers = Vector::<F, N>::new(F::new(0.0));
        #[unroll]
        for lane in 0..lanes {
            let key = i * lanes + lane;
            let (score, _) = score(products.extract(lane), scale, cap, capped);
            let weight = select(key >= first && key < end, (score - top).exp() * share, 0.0f32);
            numbers.insert(lane, F::cast_from(weight));
        }
        weights[start + i] = numbers;
    }
    if unit == 0 && end > 0 {
        log_sums[at] = top + sum.ln();
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn pull_back<F: Float, I: Int, N: Size>(
    products: &[Vector<f32, N>],
    at_weights: &[Vector<f32, N>],
    places: &[I],
    log_sums: &[f32],
    weights: &mut [Vector<F, N>],
    slopes: &mut [Vector<F, N>],
    rows: usize,
    heads: usize,
    queries: usize,
    vectors: usize,
    scale: f32,
    cap: f32,
    window: usize,
    #[comptime] capped: bool,
    #[comptime] alone: bool,
    #[define(F, I)] _types: [ElemType; 2],
) {
    let row = row_of_plane();
    if row >= rows {
        terminate!();
    }
    let (first, end, at) = seen::<I>(places, row, heads, queries, window);
    let (unit, units) = unit_of_plane();
    let start = row * vectors;
    let lanes = products[start].vector_size();
    let (from, to) = (first / lanes, (end + lanes - 1) / lanes);
    let mut log_sum = 0.0f32.runtime();
    if end > 0 {
        log_sum = log_sums[at];
    }
    let mut along = 0.0f32.runtime();
    for i in range_stepped(from + unit, to, units) {
        let (products, at_weights) = (products[start + i], at_weights[start + i]);
        #[unroll]
        for lane in 0..lanes {
            let key = i * lanes + lane;
            let (score, _) = score(products.extract(lane), scale, cap, capped);
            let weight = select(key >= first && key < end, (score - log_sum).exp(), 0.0f32);
            along += weight * at_weights.extract(lane);
        }
    }
    let along = sum_of_plane(along, alone);
    for i in range_stepped(unit, vectors, units) {
        let (products, at_weights) = (products[start + i], at_weights[start + i]);
        let mut numbers = Vector::<F, N>::new(F::new(0.0));
        let mut slopes_here = Vector::<F, N>::new(F::new(0.0));
        #[unroll]
        for lane in 0..lanes {
            let key = i * lanes + lane;
            let (score, slope) = score(products.extract(lane), scale, cap, capped);
            let visible = key >= first && key < end;
            let weight = select(visible, (score - log_sum).exp(), 0.0f32);
            numbers.insert(lane, F::cast_from(weight));
            slopes_here.insert(lane, F::cast_from(weight * (at_weights.extract(lane) - along) * slope));
        }
        weights[start + i] = numbers;
        slopes[start + i] = slopes_here;
    }
}
