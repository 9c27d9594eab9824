//! Products with a frozen matrix, which stays in the format it is kept in: a tile of it is
//! dequantized, multiplied and forgotten.
//!
//! `forward` is `y = x W^T`, `backward` is `dx = dy W`, with `W` `[rows, cols]`. Sums are float32
//! in both precisions. Work is divided over the outputs, so results do not depend on the number of
//! threads.

use std::mem::MaybeUninit;

use burn::tensor::TensorData;
use rayon::prelude::*;

use super::FrozenMatrix;
use super::output::{Columns, Scratch};
use super::product_bf16::product_bf16;
use super::wide::widest;
use crate::bf16::{BLOCK, Bf16Unit};
use crate::direction::Direction;
use crate::dot::dot;
use crate::host::filled;
use crate::threads::stay_awake;

/// What the factors of a product are rounded to. Sums are float32 either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Not rounded at all.
    F32,
    /// bfloat16, where the processor multiplies it faster ([`Precision::fastest`]) or the card has an
    /// instruction for it; elsewhere the products are those of [`Precision::F32`].
    Bf16,
}

impl Precision {
    /// bf16 where this processor has an instruction for it, otherwise float32.
    pub fn fastest() -> Self {
        if Bf16Unit::detect().is_some() { Self::Bf16 } else { Self::F32 }
    }
}

/// Activation rows at a time: what a thread sums up stays in its own cache.
const TOKENS: usize = 1024;
/// Rows of the matrix that one task of few tokens multiplies.
const ROWS: usize = BLOCK;
/// About how many columns of the output a task computes, where that leaves work for every core: of fewer, reading the
/// activations takes longer than multiplying them; of more, what is summed up does not stay in a core's second cache.
/// A multiple of every format's block.
const COLUMNS: usize = 256;
/// Up to here a product is a few dot products a row, and packing would cost more than it saves.
const FEW_TOKENS: usize = 4;

impl FrozenMatrix {
    /// `x W^T`.
    ///
    /// # Shapes
    /// - x: `[tokens, cols]`, result: `[tokens, rows]`
    ///
    /// # Panics
    /// Where `x` is not whole rows.
    pub fn forward(&self, x: &[f32], precision: Precision) -> Vec<f32> {
        self.product(x, Direction::Forward, precision)
    }

    /// `dy W`.
    ///
    /// # Shapes
    /// - dy: `[tokens, rows]`, result: `[tokens, cols]`
    ///
    /// # Panics
    /// Where `dy` is not whole rows.
    pub fn backward(&self, dy: &[f32], precision: Precision) -> Vec<f32> {
        self.product(dy, Direction::Backward, precision)
    }

    pub(super) fn product(&self, x: &[f32], direction: Direction, precision: Precision) -> Vec<f32> {
        let [summed, width] = self.widths(direction);
        filled(x.len() / summed * width, |out| self.multiply(x, direction, precision, out)).0
    }

    /// How wide a row of the input and one of the result are.
    pub(super) fn widths(&self, direction: Direction) -> [usize; 2] {
        let [rows, cols] = self.shape();
        match direction {
            Direction::Forward => [cols, rows],
            Direction::Backward => [rows, cols],
        }
    }

    /// Writes the product in one direction to all of `out`.
    ///
    /// # Panics
    /// Where `x` is not whole rows, or `out` is not as many.
    pub(super) fn multiply(
        &self,
        x: &[f32],
        direction: Direction,
        precision: Precision,
        out: &mut [MaybeUninit<f32>],
    ) {
        let [summed, width] = self.widths(direction);
        assert!(x.len().is_multiple_of(summed), "whole rows of {summed}");
        assert_eq!(out.len() / width, x.len() / summed, "as many rows of results");
        stay_awake();
        for (x, out) in x.chunks(TOKENS * summed).zip(out.chunks_mut(TOKENS * width)) {
            let out = Columns::of(out, width);
            match (direction, precision, Bf16Unit::detect()) {
                (Direction::Forward, ..) if x.len() <= FEW_TOKENS * summed => dot_products(self, x, out),
                (_, Precision::Bf16, Some(unit)) => product_bf16(self, direction, unit, x, out),
                (Direction::Forward, ..) => forward_f32(self, x, out),
                (Direction::Backward, ..) => backward_f32(self, x, out),
            }
        }
    }

    /// Rows `ids`, `[ids, cols]`, dequantized.
    ///
    /// # Panics
    /// Where an id is no row.
    pub fn select(&self, ids: &[u32]) -> TensorData {
        let [_, cols] = self.shape();
        let mut values = vec![0.0; ids.len() * cols];
        for (&id, row) in ids.iter().zip(values.chunks_exact_mut(cols)) {
            self.dequantize(id as usize, 0..cols, row);
        }
        TensorData::new(values, [ids.len(), cols])
    }
}

/// `forward` of a few tokens, as in generation: each row is read once, and float32 is as fast as
/// the memory it comes from.
fn dot_products(w: &FrozenMatrix, x: &[f32], y: Columns) {
    let [rows, cols] = w.shape();
    (0..rows.div_ceil(ROWS)).into_par_iter().for_each(|task| {
        Scratch::with(0, 0, cols, |scratch| {
            let numbers = &mut scratch.numbers[..cols];
            for row in task * ROWS..rows.min((task + 1) * ROWS) {
                w.dequantize(row, 0..cols, numbers);
                for (token, x) in x.chunks_exact(cols).enumerate() {
                    let sum = widest!(|| dot(x, numbers));
                    // SAFETY: this row of the matrix, a column of the output, is this task's alone.
                    #[allow(unsafe_code)]
                    unsafe {
                        y.write(token, &(row..row + 1), &[sum]);
                    }
                }
            }
        });
    });
}

/// A tile of rows is dequantized, then `y[:, tile] = x W[tile]^T`.
fn forward_f32(w: &FrozenMatrix, x: &[f32], y: Columns) {
    let [rows, cols] = w.shape();
    let tokens = x.len() / cols;
    (0..rows.div_ceil(COLUMNS)).into_par_iter().for_each(|task| {
        let here = task * COLUMNS..rows.min((task + 1) * COLUMNS);
        Scratch::with(0, 0, here.len() * cols, |scratch| {
            let tile = &mut scratch.numbers[..here.len() * cols];
            for (row, numbers) in here.clone().zip(tile.chunks_exact_mut(cols)) {
                w.dequantize(row, 0..cols, numbers);
            }
            // SAFETY: x is [tokens, cols], tile [here, cols]; this task alone writes the columns
            // `here` of y, whose rows lie `rows` apart.
            #[allow(unsafe_code)]
            unsafe {
                product_f32(
                    [tokens, here.len(), cols],
                    (y.at(0, &here), rows),
                    (x, cols, 1),
                    (tile, 1, cols),
                );
            }
        });
    });
}

/// A tile of columns is dequantized a few rows at a time, then `dx[:, tile] += dy W[:, tile]`.
fn backward_f32(w: &FrozenMatrix, dy: &[f32], dx: Columns) {
    let [rows, cols] = w.shape();
    let tokens = dy.len() / rows;
    let columns = columns_a_task(w, Direction::Backward);
    (0..cols.div_ceil(columns)).into_par_iter().for_each(|task| {
        let here = task * columns..cols.min((task + 1) * columns);
        Scratch::with(0, 0, rows * here.len(), |scratch| {
            let tile = &mut scratch.numbers[..rows * here.len()];
            for (row, numbers) in tile.chunks_exact_mut(here.len()).enumerate() {
                w.dequantize(row, here.clone(), numbers);
            }
            // SAFETY: dy is [tokens, rows], tile [rows, here]; this task alone writes the columns
            // `here` of dx, whose rows lie `cols` apart.
            #[allow(unsafe_code)]
            unsafe {
                product_f32(
                    [tokens, here.len(), rows],
                    (dx.at(0, &here), cols),
                    (dy, rows, 1),
                    (tile, here.len(), 1),
                );
            }
        });
    });
}

/// `c = a b` in float32, `[m, k]` by `[k, n]`; a and b with their row and column strides, c with
/// its row stride.
///
/// # Safety
/// c may be written at `m` rows of `n`; a and b hold what their strides reach.
#[allow(unsafe_code)]
unsafe fn product_f32(
    [m, n, k]: [usize; 3],
    (c, c_row): (*mut f32, usize),
    (a, a_row, a_col): (&[f32], usize, usize),
    (b, b_row, b_col): (&[f32], usize, usize),
) {
    let one = gemm::Parallelism::None;
    // SAFETY: by the contract above.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c,
            1,
            c_row as isize,
            false,
            a.as_ptr(),
            a_col as isize,
            a_row as isize,
            b.as_ptr(),
            b_col as isize,
            b_row as isize,
            0.0,
            1.0,
            false,
            false,
            false,
            one,
        );
    }
}

/// How many columns of the output a task computes: as many tasks for every core, each of about [`COLUMNS`].
pub(super) fn columns_a_task(w: &FrozenMatrix, direction: Direction) -> usize {
    let [_, width] = w.widths(direction);
    let step = match direction {
        Direction::Forward => BLOCK,
        Direction::Backward => w.column_step().max(BLOCK),
    };
    let tasks = (width / COLUMNS).max(1).next_multiple_of(rayon::current_num_threads());
    width.div_ceil(tasks).next_multiple_of(step)
}

#[cfg(test)]
#[allow(clippy::float_cmp)] // small whole numbers, exact in every precision
mod tests {
    use super::*;
    use crate::frozen::Format;
    use crate::small_numbers as numbers;

    /// A few tokens and more, and matrices of which several tasks take a part each.
    #[test]
    fn tasks_write_all_of_both_products() {
        for ([rows, cols], tokens) in [([1, 1], 1), ([3, 70], 4), ([3, 70], 6), ([260, 3], 2), ([260, 3], 5)]
        {
            let w = numbers(rows * cols, 1);
            let bytes: Vec<u8> = w.iter().flat_map(|x| x.to_le_bytes()).collect();
            let matrix = FrozenMatrix::dense(Format::F32, [rows, cols], bytes.into()).unwrap();
            let (x, dy) = (numbers(tokens * cols, 2), numbers(tokens * rows, 3));
            let y: Vec<f32> =
                x.chunks(cols).flat_map(|x| w.chunks(cols).map(move |w| plain_dot(x, w))).collect();
            let columns: Vec<Vec<f32>> =
                (0..cols).map(|col| w[col..].iter().step_by(cols).copied().collect()).collect();
            let dx: Vec<f32> =
                dy.chunks(rows).flat_map(|dy| columns.iter().map(move |w| plain_dot(dy, w))).collect();
            for precision in precisions() {
                assert_eq!(matrix.forward(&x, precision), y, "{tokens} tokens, {rows} x {cols}");
                assert_eq!(matrix.backward(&dy, precision), dx, "{tokens} tokens, {rows} x {cols}, back");
            }
        }
    }

    /// Miri has no unit for bf16: both are one.
    fn precisions() -> impl Iterator<Item = Precision> {
        [Precision::F32, Precision::Bf16].into_iter().take(if cfg!(miri) { 1 } else { 2 })
    }

    fn plain_dot(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }
}
