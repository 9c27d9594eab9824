//! The products of an adapter's two factors, a few tokens or columns at a time.

use rayon::prelude::*;

use crate::product::{Matrix, MatrixMut, multiply_f32};
use crate::rewritten::Rewritten;

/// Tokens of one task.
const TOKENS: usize = 64;
/// Columns of a factor's gradient in one task: each sums over all tokens.
const COLUMNS: usize = 128;

/// The two factors of an adapter.
#[derive(Clone, Copy)]
pub struct Pair<'a> {
    /// `[rank, in]`
    pub a: &'a [f32],
    /// `[out, rank]`
    pub b: &'a [f32],
    pub rank: usize,
    pub scale: f32,
}

impl Pair<'_> {
    fn a(&self) -> Matrix<'_> {
        Matrix::rows(self.a, self.a.len() / self.rank)
    }

    fn b(&self) -> Matrix<'_> {
        Matrix::rows(self.b, self.rank)
    }

    /// `y += low B^T` with `low = scale * x A^T`, which it returns, `[tokens, rank]`.
    ///
    /// # Panics
    /// Where the numbers of `x` and `y` are not as many rows.
    pub fn add(&self, y: Rewritten, x: &[f32]) -> Vec<f32> {
        let ([_, inputs], [outputs, _]) = (self.a().shape(), self.b().shape());
        assert_eq!(x.len() / inputs, y.len() / outputs, "as many rows of input as of output");
        let mut low = vec![0.0; x.len() / inputs * self.rank];
        let tasks = x.par_chunks(TOKENS * inputs).zip(low.par_chunks_mut(TOKENS * self.rank));
        y.pieces(TOKENS * outputs).zip(tasks).for_each(|(y, (x, low))| {
            multiply_f32(
                Matrix::rows(x, inputs),
                self.a().transposed(),
                MatrixMut::rows(low, self.rank),
                false,
            );
            for x in &mut *low {
                *x *= self.scale;
            }
            multiply_f32(
                Matrix::rows(low, self.rank),
                self.b().transposed(),
                MatrixMut::rows(y, outputs),
                true,
            );
        });
        low
    }

    /// `scale * dy B`: the gradient at `x A^T`, `numbers` in all.
    pub fn pull_back(&self, dy: &[f32], numbers: usize) -> Vec<f32> {
        let [outputs, _] = self.b().shape();
        let mut dlow = vec![0.0; numbers];
        let tasks = dlow.par_chunks_mut(TOKENS * self.rank).zip(dy.par_chunks(TOKENS * outputs));
        tasks.for_each(|(dlow, dy)| {
            multiply_f32(Matrix::rows(dy, outputs), self.b(), MatrixMut::rows(dlow, self.rank), false);
            for x in dlow {
                *x *= self.scale;
            }
        });
        dlow
    }

    /// `dlow A`: the gradient at `x`.
    pub fn at_x(&self, dlow: &[f32], dx: &mut [f32]) {
        let [_, inputs] = self.a().shape();
        let tasks = dx.par_chunks_mut(TOKENS * inputs).zip(dlow.par_chunks(TOKENS * self.rank));
        tasks.for_each(|(dx, dlow)| {
            multiply_f32(Matrix::rows(dlow, self.rank), self.a(), MatrixMut::rows(dx, inputs), false);
        });
    }

    /// `dlow^T x`: the gradient at A.
    pub fn at_a(&self, dlow: &[f32], x: &[f32], da: &mut [f32]) {
        let ([rank, inputs], tokens) = (self.a().shape(), dlow.len() / self.rank);
        let columns = |start: usize| {
            let width = COLUMNS.min(inputs - start);
            let mut piece = vec![0.0; rank * width];
            let x = Matrix::new(&x[start..], [tokens, width], inputs);
            multiply_f32(Matrix::rows(dlow, rank).transposed(), x, MatrixMut::rows(&mut piece, width), false);
            piece
        };
        let pieces: Vec<_> = (0..inputs).into_par_iter().step_by(COLUMNS).map(columns).collect();
        for (i, piece) in pieces.iter().enumerate() {
            let width = piece.len() / rank;
            for (da, piece) in da.chunks_exact_mut(inputs).zip(piece.chunks_exact(width)) {
                da[i * COLUMNS..][..width].copy_from_slice(piece);
            }
        }
    }

    /// `dy^T low`: the gradient at B.
    pub fn at_b(&self, dy: &[f32], low: &[f32], db: &mut [f32]) {
        let ([outputs, rank], tokens) = (self.b().shape(), low.len() / self.rank);
        db.par_chunks_mut(COLUMNS * rank).enumerate().for_each(|(i, db)| {
            let dy = Matrix::new(&dy[i * COLUMNS..], [tokens, db.len() / rank], outputs);
            multiply_f32(dy.transposed(), Matrix::rows(low, rank), MatrixMut::rows(db, rank), false);
        });
    }
}
