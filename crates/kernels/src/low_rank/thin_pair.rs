//! The products of an adapter's two factors where their rank is small, a few tokens at a time: all that is read of them is
//! read once.

use rayon::prelude::*;

use super::Scaling;
use super::seen::Seen;
use super::thin::{self, ROWS};
use crate::frozen::wide::widest;
use crate::product::turned;
use crate::rewritten::{Rewritten, total};

/// Tokens of one task.
const TOKENS: usize = 32;
/// Parts of the tokens that factors' gradients are summed in, each in memory of its own.
const PARTS: usize = 16;

/// The two factors of an adapter, with rows of zeros behind theirs.
pub struct ThinPair {
    /// `[rows, in]`
    a: Vec<f32>,
    /// B turned, `[rows, out]`.
    b: Vec<f32>,
    rank: usize,
    /// As many rows as [`thin`] wants.
    rows: usize,
    scale: f32,
    seen: Seen,
}

impl ThinPair {
    /// `a` is `[rank, in]`, `b` is `[out, rank]`.
    pub fn new(a: &[f32], b: &[f32], rank: usize, scaling: Scaling) -> Self {
        let rows = rank.next_multiple_of(ROWS);
        let (inputs, outputs) = (a.len() / rank, b.len() / rank);
        let (mut a, mut b) = (a.to_vec(), turned(b, rank));
        a.resize(rows * inputs, 0.0);
        b.resize(rows * outputs, 0.0);
        let seen = Seen { mask: scaling.mask, width: inputs };
        Self { a, b, rank, rows, scale: scaling.scale as f32, seen }
    }

    fn inputs(&self) -> usize {
        self.seen.width
    }

    fn outputs(&self) -> usize {
        self.b.len() / self.rows
    }

    /// See [`super::Pair::add`]: `low` is `[tokens, rows]`.
    pub fn add(&self, y: Rewritten, x: &[f32]) -> Vec<f32> {
        let (inputs, outputs) = (self.inputs(), self.outputs());
        assert_eq!(x.len() / inputs, y.len() / outputs, "as many rows of input as of output");
        let mut low = vec![0.0; x.len() / inputs * self.rows];
        let tasks = x.par_chunks(TOKENS * inputs).zip(low.par_chunks_mut(TOKENS * self.rows));
        y.pieces(TOKENS * outputs).zip(tasks).enumerate().for_each(|(i, (y, (x, low)))| {
            self.dots(&self.seen.of(i * TOKENS, x), &self.a, low);
            self.add_rows(low, &self.b, y);
        });
        low
    }

    /// See [`super::Pair::pull_back`].
    pub fn pull_back(&self, dy: &[f32], x: &[f32], low: &[f32], dx: Option<Rewritten>) -> [Vec<f32>; 2] {
        let tokens = (low.len() / self.rows).div_ceil(PARTS).max(TOKENS);
        let [inputs, outputs] = [self.inputs(), self.outputs()].map(|width| tokens * width);
        let dx = self.seen.gradients(dx, x, tokens);
        let tasks = dy.par_chunks(outputs).zip(x.par_chunks(inputs)).zip(low.par_chunks(tokens * self.rows));
        let parts = tasks.zip(dx).enumerate();
        let parts = parts.map(|(i, (((dy, x), low), dx))| self.pull_back_part(i * tokens, [dy, x, low], dx));
        // Collected first: whichever task ends first, they are summed in their order.
        let (of_a, of_b): (Vec<_>, Vec<_>) = parts.collect();
        let mut a = total(of_a, self.a.len());
        a.truncate(self.rank * self.inputs());
        [a, turned(&total(of_b, self.b.len())[..self.rank * self.outputs()], self.outputs())]
    }

    /// The gradients at A, and at B turned, by some of the tokens, from `first` on.
    fn pull_back_part(
        &self,
        first: usize,
        [dy, x, low]: [&[f32]; 3],
        mut dx: Option<&mut [f32]>,
    ) -> (Vec<f32>, Vec<f32>) {
        let (inputs, outputs) = (self.inputs(), self.outputs());
        let [mut a, mut b] = [&self.a, &self.b].map(|rows| vec![0.0; rows.len()]);
        let mut dlow = vec![0.0; TOKENS * self.rows];
        let tokens = dy.chunks(TOKENS * outputs).zip(x.chunks(TOKENS * inputs));
        for (i, ((dy, x), low)) in tokens.zip(low.chunks(TOKENS * self.rows)).enumerate() {
            let (dlow, token) = (&mut dlow[..low.len()], first + i * TOKENS);
            self.dots(dy, &self.b, dlow);
            if let Some(dx) = &mut dx {
                let dx = &mut dx[i * TOKENS * inputs..][..x.len()];
                self.seen.add_to(dx, token, |dx| self.add_rows(dlow, &self.a, dx));
            }
            self.add_outer(dlow, &self.seen.of(token, x), &mut a);
            self.add_outer(low, dy, &mut b);
        }
        (a, b)
    }

    /// `low = scale * x rows^T`.
    fn dots(&self, x: &[f32], rows: &[f32], low: &mut [f32]) {
        let tokens = x.chunks_exact(rows.len() / self.rows).zip(low.chunks_exact_mut(self.rows));
        widest!(|| {
            for (x, low) in tokens {
                thin::dots(x, rows, self.scale, low);
            }
        });
    }

    /// `y += low rows`.
    fn add_rows(&self, low: &[f32], rows: &[f32], y: &mut [f32]) {
        let tokens = low.chunks_exact(self.rows).zip(y.chunks_exact_mut(rows.len() / self.rows));
        widest!(|| {
            for (low, y) in tokens {
                thin::add_rows(low, rows, y);
            }
        });
    }

    /// `rows += low^T x`.
    fn add_outer(&self, low: &[f32], x: &[f32], rows: &mut [f32]) {
        let width = rows.len() / self.rows;
        widest!(|| thin::add_outer(low, x, width, rows));
    }
}
