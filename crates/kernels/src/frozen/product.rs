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
use super::product_bf16::{backward_bf16, forward_bf16};
use super::wide::widest;
use crate::bf16::{BLOCK, Bf16Unit};
use crate::direction::Direction;
use crate::dot::dot;
use crate::host::filled;
use crate::product::product_f32;
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

    /// Whether products on this processor are in bf16.
    pub fn is_bf16_here(self) -> bool {
        self == Self::Bf16 && Self::fastest() == Self::Bf16
    }
}

/// Activation rows at a time: what a thread sums up stays in its own cache.
pub(super) const TOKENS: usize = 1024;
/// Rows of the matrix that one task of few tokens multiplies.
const ROWS: usize = BLOCK;
/// About how many columns of the output a task computes, where that leaves work for every core: of fewer, reading the
/// activations takes longer than multiplying them; of more, what is summed up does not stay in a core's second cache.
/// A multiple of every format's block.
const COLUMNS: usize = 256;
/// Up to here a product is a few dot products a row, and packing would cost more than it saves.
pub(super) const FEW_TOKENS: usize = 4;

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
        match direction {
            Direction::Forward => forward(vec![(self, out)], x, None, precision),
            Direction::Backward => backward(&[(self, x)], precision, out),
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

/// `x W^T` of matrices of one width, each written to all of what stands beside it. That of an only one is added to `onto`,
/// if that is there.
///
/// # Panics
/// Where `x` is not whole rows, or what is written is not as many.
pub(super) fn forward(
    products: Vec<(&FrozenMatrix, &mut [MaybeUninit<f32>])>,
    x: &[f32],
    onto: Option<&[f32]>,
    precision: Precision,
) {
    let Some(cols) = products.first().map(|(w, _)| w.shape()[1]) else { return };
    assert!(x.len().is_multiple_of(cols), "whole rows of {cols}");
    assert!(onto.is_none() || products.len() == 1, "one product to be added");
    let whole = |(w, out): &(&FrozenMatrix, &mut [_])| {
        w.shape()[1] == cols && out.len() == x.len() / cols * w.shape()[0]
    };
    assert!(products.iter().all(whole), "matrices of one width, as many rows of results");
    stay_awake();
    let mut products: Vec<_> =
        products.into_iter().map(|(w, out)| (w, out.chunks_mut(TOKENS * w.shape()[0]))).collect();
    for (i, x) in x.chunks(TOKENS * cols).enumerate() {
        let places = products.iter_mut().filter_map(|(w, chunks)| {
            let ([rows, _], out) = (w.shape(), chunks.next()?);
            let onto = onto.map(|onto| &onto[i * TOKENS * rows..][..out.len()]);
            Some((*w, Columns::of(out, rows).added_to(onto)))
        });
        let places: Vec<_> = places.collect();
        match unit_for(precision) {
            _ if x.len() <= FEW_TOKENS * cols => places.into_iter().for_each(|(w, y)| dot_products(w, x, y)),
            Some(unit) => forward_bf16(unit, &places, x),
            None => places.into_iter().for_each(|(w, y)| forward_f32(w, x, y)),
        }
    }
}

/// The sum of `dy W` over matrices of one width, each with its `dy`, written to all of `out`.
///
/// # Panics
/// Where `out` is not whole rows, or a `dy` is not as many.
pub(super) fn backward(
    terms: &[(&FrozenMatrix, &[f32])],
    precision: Precision,
    out: &mut [MaybeUninit<f32>],
) {
    let Some(cols) = terms.first().map(|(w, _)| w.shape()[1]) else { return };
    assert!(out.len().is_multiple_of(cols), "whole rows of {cols}");
    let whole = |(w, dy): &(&FrozenMatrix, &[f32])| {
        w.shape()[1] == cols && dy.len() == out.len() / cols * w.shape()[0]
    };
    assert!(terms.iter().all(whole), "matrices of one width, as many rows of gradients");
    stay_awake();
    for (i, out) in out.chunks_mut(TOKENS * cols).enumerate() {
        let tokens = out.len() / cols;
        let here = terms.iter().map(|&(w, dy)| {
            let [rows, _] = w.shape();
            (w, &dy[i * TOKENS * rows..][..tokens * rows])
        });
        let terms: Vec<_> = here.collect();
        let dx = Columns::of(out, cols);
        match unit_for(precision) {
            Some(unit) => backward_bf16(unit, &terms, dx),
            None => backward_f32(&terms, dx),
        }
    }
}

/// What multiplies bf16, where products are to be in it.
fn unit_for(precision: Precision) -> Option<Bf16Unit> {
    Bf16Unit::detect().filter(|_| precision == Precision::Bf16)
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
                let add = y.lay(&here);
                product_f32(
                    [tokens, here.len(), cols],
                    (y.at(0, &here), rows, add),
                    (x, cols, 1),
                    (tile, 1, cols),
                );
            }
        });
    });
}

/// A tile of columns of each matrix is dequantized a few rows at a time, then `dx[:, tile] += dy W[:, tile]`.
fn backward_f32(terms: &[(&FrozenMatrix, &[f32])], dx: Columns) {
    let cols = terms[0].0.shape()[1];
    let matrices: Vec<_> = terms.iter().map(|(w, _)| *w).collect();
    let columns = columns_a_task(cols, column_step(&matrices));
    (0..cols.div_ceil(columns)).into_par_iter().for_each(|task| {
        let here = task * columns..cols.min((task + 1) * columns);
        for (i, &(w, dy)) in terms.iter().enumerate() {
            let [rows, _] = w.shape();
            Scratch::with(0, 0, rows * here.len(), |scratch| {
                let tile = &mut scratch.numbers[..rows * here.len()];
                for (row, numbers) in tile.chunks_exact_mut(here.len()).enumerate() {
                    w.dequantize(row, here.clone(), numbers);
                }
                // SAFETY: dy is [tokens, rows], tile [rows, here]; this task alone writes the columns
                // `here` of dx, whose rows lie `cols` apart, for the first matrix before it reads them.
                #[allow(unsafe_code)]
                unsafe {
                    product_f32(
                        [dy.len() / rows, here.len(), rows],
                        (dx.at(0, &here), cols, i > 0),
                        (dy, rows, 1),
                        (tile, here.len(), 1),
                    );
                }
            });
        }
    });
}

/// How many of the `width` columns of an output a task computes, a multiple of `step`: as many tasks for every core, each of
/// about [`COLUMNS`].
pub(super) fn columns_a_task(width: usize, step: usize) -> usize {
    let tasks = (width / COLUMNS).max(1).next_multiple_of(rayon::current_num_threads());
    width.div_ceil(tasks).next_multiple_of(step)
}

/// What the columns of a task on the way back have to be a multiple of.
pub(super) fn column_step(matrices: &[&FrozenMatrix]) -> usize {
    matrices.iter().map(|w| w.column_step()).fold(BLOCK, usize::max)
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

    /// Matrices that share an input, wide enough for several tasks each and deep enough for several passes.
    #[test]
    fn several_products_are_what_each_would_be() {
        let (rows, cols, tokens) = if cfg!(miri) { ([3, 5], 7, 6) } else { ([700, 33], 1100, 70) };
        let matrix = |rows: usize, seed| {
            let bytes = numbers(rows * cols, seed).iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>();
            FrozenMatrix::dense(Format::F32, [rows, cols], bytes.into()).unwrap()
        };
        let [a, b] = [matrix(rows[0], 1), matrix(rows[1], 5)];
        let x = numbers(tokens * cols, 2);
        let dys = [numbers(tokens * rows[0], 3), numbers(tokens * rows[1], 7)];
        for precision in precisions() {
            let (y_a, (y_b, ())) = filled(tokens * rows[0], |y_a| {
                filled(tokens * rows[1], |y_b| forward(vec![(&a, y_a), (&b, y_b)], &x, None, precision))
            });
            assert!(y_a == a.forward(&x, precision) && y_b == b.forward(&x, precision), "{precision:?}");
            let (dx, ()) = filled(x.len(), |dx| backward(&[(&a, &dys[0]), (&b, &dys[1])], precision, dx));
            let [of_a, of_b] = [a.backward(&dys[0], precision), b.backward(&dys[1], precision)];
            let sums: Vec<f32> = of_a.iter().zip(of_b).map(|(x, y)| x + y).collect();
            assert!(dx == sums, "{precision:?}, back");
            let (sum, ()) = filled(y_a.len(), |out| forward(vec![(&a, out)], &x, Some(&dys[0]), precision));
            let sums: Vec<f32> = y_a.iter().zip(&dys[0]).map(|(x, y)| x + y).collect();
            assert!(sum == sums, "{precision:?}, added");
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
