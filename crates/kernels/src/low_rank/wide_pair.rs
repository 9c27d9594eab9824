//! The products of an adapter's two factors where their rank is large, as products of matrices: a task has some tokens, or
//! for what is summed over all of them some features.

use rayon::prelude::*;

use super::Scaling;
use super::seen::Seen;
use crate::dropout::Mask;
use crate::product::{Matrix, MatrixMut, multiply_f32, turned};
use crate::rewritten::Rewritten;

/// Tokens of one task.
const TOKENS: usize = 64;
/// Features of one task that sums over tokens.
const FEATURES: usize = 128;

/// The two factors of an adapter.
pub struct WidePair<'a> {
    /// `[rank, in]`
    a: Matrix<'a>,
    /// `[out, rank]`
    b: Matrix<'a>,
    rank: usize,
    scale: f32,
    seen: Seen,
}

impl<'a> WidePair<'a> {
    /// `a` is `[rank, in]`, `b` is `[out, rank]`.
    pub fn new(a: &'a [f32], b: &'a [f32], rank: usize, scaling: Scaling) -> Self {
        let (a, b) = (Matrix::rows(a, a.len() / rank), Matrix::rows(b, rank));
        let seen = Seen { mask: scaling.mask, width: a.shape()[1] };
        Self { a, b, rank, scale: scaling.scale as f32, seen }
    }

    fn inputs(&self) -> usize {
        self.seen.width
    }

    fn outputs(&self) -> usize {
        self.b.shape()[0]
    }

    /// See [`super::Pair::add`].
    pub fn add(&self, y: Rewritten, x: &[f32]) -> Vec<f32> {
        let (inputs, outputs) = (self.inputs(), self.outputs());
        assert_eq!(x.len() / inputs, y.len() / outputs, "as many rows of input as of output");
        let mut low = vec![0.0; x.len() / inputs * self.rank];
        let tasks = x.par_chunks(TOKENS * inputs).zip(low.par_chunks_mut(TOKENS * self.rank));
        y.pieces(TOKENS * outputs).zip(tasks).enumerate().for_each(|(i, (y, (x, low)))| {
            self.dots(&self.seen.of(i * TOKENS, x), self.a.transposed(), low);
            self.add_rows(low, self.b.transposed(), y);
        });
        low
    }

    /// See [`super::Pair::pull_back`].
    pub fn pull_back(&self, dy: &[f32], x: &[f32], low: &[f32], dx: Option<Rewritten>) -> [Vec<f32>; 2] {
        let (inputs, outputs) = (self.inputs(), self.outputs());
        let dx = self.seen.gradients(dx, x, TOKENS);
        let mut dlow = vec![0.0; low.len()];
        let tasks = dy.par_chunks(TOKENS * outputs).zip(dlow.par_chunks_mut(TOKENS * self.rank)).zip(dx);
        tasks.enumerate().for_each(|(i, ((dy, dlow), dx))| {
            self.dots(dy, self.b, dlow);
            if let Some(dx) = dx {
                self.seen.add_to(dx, i * TOKENS, |dx| self.add_rows(dlow, self.a, dx));
            }
        });
        let of_a = self.sums_over_tokens(&dlow, x, inputs, self.seen.mask);
        let mut a = Vec::with_capacity(self.rank * inputs);
        for row in 0..self.rank {
            for part in &of_a {
                let features = part.len() / self.rank;
                a.extend_from_slice(&part[row * features..][..features]);
            }
        }
        let of_b = self.sums_over_tokens(low, dy, outputs, None);
        let b: Vec<_> = of_b.par_iter().map(|part| turned(part, part.len() / self.rank)).collect();
        [a, b.concat()]
    }

    /// `low = scale * x factor`.
    fn dots(&self, x: &[f32], factor: Matrix, low: &mut [f32]) {
        let x = Matrix::rows(x, factor.shape()[0]);
        multiply_f32(x, factor, MatrixMut::rows(low, self.rank), false);
        for x in low {
            *x *= self.scale;
        }
    }

    /// `y += low factor`.
    fn add_rows(&self, low: &[f32], factor: Matrix, y: &mut [f32]) {
        let out = MatrixMut::rows(y, factor.shape()[1]);
        multiply_f32(Matrix::rows(low, self.rank), factor, out, true);
    }

    /// `low^T x` of what the mask leaves of `x`, `[tokens, width]`, in parts of a few features, `[rank, features]` each.
    fn sums_over_tokens(&self, low: &[f32], x: &[f32], width: usize, mask: Option<Mask>) -> Vec<Vec<f32>> {
        let (tokens, low) = (low.len() / self.rank, Matrix::rows(low, self.rank).transposed());
        let part = |first: usize| {
            let features = FEATURES.min(width - first);
            let x = Matrix::new(x.get(first..).unwrap_or_default(), [tokens, features], width);
            let seen = mask.map(|mask| {
                let mut seen = x.to_vec();
                mask.apply_to_features(0, first, &mut seen, features);
                seen
            });
            let x = seen.as_ref().map_or(x, |seen| Matrix::rows(seen, features));
            let mut sums = vec![0.0; self.rank * features];
            multiply_f32(low, x, MatrixMut::rows(&mut sums, features), false);
            sums
        };
        (0..width).into_par_iter().step_by(FEATURES).map(part).collect()
    }
}
