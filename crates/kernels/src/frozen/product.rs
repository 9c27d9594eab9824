//! Products with a frozen matrix, which stays in the format it is kept in: a tile of it is
//! dequantized, multiplied and forgotten.
//!
//! `forward` is `y = x W^T`, `backward` is `dx = dy W`, with `W` `[rows, cols]`. Sums are float32
//! in both precisions. Work is divided over the outputs, so results do not depend on the number of
//! threads.

use std::ops::Range;

use burn::tensor::TensorData;
use rayon::prelude::*;

use super::FrozenMatrix;
use super::bf16_tiles::{BLOCK, Bf16Unit, DEPTH, Multiplier, SIDE, Strips, TILE};

/// What the factors of a product are rounded to. Sums are float32 either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Not rounded at all.
    F32,
    /// bfloat16, where the processor multiplies it faster ([`Precision::fastest`]); elsewhere the
    /// products are those of [`Precision::F32`].
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
/// Rows of the matrix that one task of `forward` multiplies.
const ROWS: usize = 2 * BLOCK;
/// Columns dequantized at a time in `forward`. A multiple of every format's block.
const FORWARD_DEPTH: usize = 512;
/// Columns of the matrix that one task of `backward` multiplies. A multiple of every format's block.
const COLUMNS: usize = 256;
/// Rows dequantized at a time in `backward`.
const BACKWARD_DEPTH: usize = 256;
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
        let [rows, cols] = self.shape();
        assert_eq!(x.len() % cols, 0, "activations of whole rows of {cols}");
        let mut y = vec![0.0; x.len() / cols * rows];
        if y.is_empty() {
            return y;
        }
        for (x, y) in x.chunks(TOKENS * cols).zip(y.chunks_mut(TOKENS * rows)) {
            let tokens = x.len() / cols;
            match (precision, Bf16Unit::detect()) {
                _ if tokens <= FEW_TOKENS => dot_products(self, x, y),
                (Precision::Bf16, Some(unit)) => forward_bf16(self, unit, x, y),
                _ => forward_f32(self, x, y),
            }
        }
        y
    }

    /// `dy W`.
    ///
    /// # Shapes
    /// - dy: `[tokens, rows]`, result: `[tokens, cols]`
    ///
    /// # Panics
    /// Where `dy` is not whole rows.
    pub fn backward(&self, dy: &[f32], precision: Precision) -> Vec<f32> {
        let [rows, cols] = self.shape();
        assert_eq!(dy.len() % rows, 0, "gradients of whole rows of {rows}");
        let mut dx = vec![0.0; dy.len() / rows * cols];
        if dx.is_empty() {
            return dx;
        }
        for (dy, dx) in dy.chunks(TOKENS * rows).zip(dx.chunks_mut(TOKENS * cols)) {
            match (precision, Bf16Unit::detect()) {
                (Precision::Bf16, Some(unit)) => backward_bf16(self, unit, dy, dx),
                _ => backward_f32(self, dy, dx),
            }
        }
        dx
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

    /// Numbers `cols` of `row`, with zeros behind the row's end.
    fn dequantize_padded(&self, row: usize, cols: Range<usize>, out: &mut [f32]) {
        let [rows, width] = self.shape();
        let end = if row < rows { cols.end.min(width) } else { cols.start };
        let (numbers, rest) = out.split_at_mut(end - cols.start);
        if !numbers.is_empty() {
            self.dequantize(row, cols.start..end, numbers);
        }
        rest.fill(0.0);
    }
}

/// An output that tasks write disjoint columns of.
#[derive(Clone, Copy)]
struct Columns {
    start: *mut f32,
    rows: usize,
    width: usize,
}

// SAFETY: `write` is unsafe and asks for disjoint columns.
#[allow(unsafe_code)]
unsafe impl Send for Columns {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Columns {}

impl Columns {
    fn of(values: &mut [f32], width: usize) -> Self {
        Self { start: values.as_mut_ptr(), rows: values.len() / width, width }
    }

    /// The part of `row` that begins at `column`.
    ///
    /// # Safety
    /// The values outlive the slice, and no other task touches these columns.
    #[allow(unsafe_code)]
    unsafe fn slice<'a>(self, row: usize, columns: Range<usize>) -> &'a mut [f32] {
        assert!(row < self.rows && columns.start <= columns.end && columns.end <= self.width);
        // SAFETY: within the values by the assertion, disjoint by the caller's word.
        unsafe {
            std::slice::from_raw_parts_mut(self.start.add(row * self.width + columns.start), columns.len())
        }
    }
}

/// `forward` of a few tokens, as in generation: each row is read once, and float32 is as fast as
/// the memory it comes from.
fn dot_products(w: &FrozenMatrix, x: &[f32], y: &mut [f32]) {
    let [rows, cols] = w.shape();
    let out = Columns::of(y, rows);
    (0..rows.div_ceil(ROWS)).into_par_iter().for_each_init(
        || vec![0.0; cols],
        |numbers, task| {
            for row in task * ROWS..rows.min((task + 1) * ROWS) {
                w.dequantize(row, 0..cols, numbers);
                for (token, x) in x.chunks_exact(cols).enumerate() {
                    // SAFETY: this row of the matrix, a column of the output, is this task's alone.
                    #[allow(unsafe_code)]
                    let y = unsafe { out.slice(token, row..row + 1) };
                    y[0] = dot(x, numbers);
                }
            }
        },
    );
}

/// In sixteen sums, which compilers keep in one or two registers.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0_f32; 16];
    let (a, a_rest) = a.as_chunks::<16>();
    let (b, b_rest) = b.as_chunks::<16>();
    for (a, b) in a.iter().zip(b) {
        for i in 0..16 {
            sums[i] += a[i] * b[i];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

/// A tile of rows is dequantized, then `y[:, tile] = x W[tile]^T`.
fn forward_f32(w: &FrozenMatrix, x: &[f32], y: &mut [f32]) {
    const TASK: usize = 4 * ROWS;
    let [rows, cols] = w.shape();
    let tokens = x.len() / cols;
    let out = Columns::of(y, rows);
    (0..rows.div_ceil(TASK)).into_par_iter().for_each_init(Vec::new, |tile: &mut Vec<f32>, task| {
        let here = task * TASK..rows.min((task + 1) * TASK);
        tile.resize(here.len() * cols, 0.0);
        for (row, numbers) in here.clone().zip(tile.chunks_exact_mut(cols)) {
            w.dequantize(row, 0..cols, numbers);
        }
        // SAFETY: x is [tokens, cols], tile [here, cols]; this task alone writes the columns
        // `here` of y, whose rows lie `rows` apart.
        #[allow(unsafe_code)]
        unsafe {
            let y = out.slice(0, here.clone()).as_mut_ptr();
            product_f32([tokens, here.len(), cols], (y, rows), (x, cols, 1), (tile, 1, cols));
        }
    });
}

/// A tile of columns is dequantized a few rows at a time, then `dx[:, tile] += dy W[:, tile]`.
fn backward_f32(w: &FrozenMatrix, dy: &[f32], dx: &mut [f32]) {
    let [rows, cols] = w.shape();
    let tokens = dy.len() / rows;
    let out = Columns::of(dx, cols);
    (0..cols.div_ceil(COLUMNS)).into_par_iter().for_each_init(Vec::new, |tile: &mut Vec<f32>, task| {
        let here = task * COLUMNS..cols.min((task + 1) * COLUMNS);
        tile.resize(rows * here.len(), 0.0);
        for (row, numbers) in tile.chunks_exact_mut(here.len()).enumerate() {
            w.dequantize(row, here.clone(), numbers);
        }
        // SAFETY: dy is [tokens, rows], tile [rows, here]; this task alone writes the columns
        // `here` of dx, whose rows lie `cols` apart.
        #[allow(unsafe_code)]
        unsafe {
            let dx = out.slice(0, here.clone()).as_mut_ptr();
            product_f32([tokens, here.len(), rows], (dx, cols), (dy, rows, 1), (tile, here.len(), 1));
        }
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
            m, n, k, c, 1, c_row as isize, false, a.as_ptr(), a_col as isize, a_row as isize, b.as_ptr(),
            b_col as isize, b_row as isize, 0.0, 1.0, false, false, false, one,
        );
    }
}

fn forward_bf16(w: &FrozenMatrix, unit: Bf16Unit, x: &[f32], y: &mut [f32]) {
    let [rows, cols] = w.shape();
    let tokens = x.len() / cols;
    let right = Packed::pairs_along_rows(unit, x, cols, FORWARD_DEPTH);
    let out = Columns::of(y, rows);
    (0..rows.div_ceil(ROWS)).into_par_iter().for_each_init(
        || (vec![0.0; right.strips * SIDE * ROWS], vec![0; ROWS * FORWARD_DEPTH], [0.0; FORWARD_DEPTH]),
        |(sums, left, numbers), task| {
            let multiplier = Multiplier::new(unit);
            sums.fill(0.0);
            for (pass, start) in (0..cols).step_by(FORWARD_DEPTH).enumerate() {
                let depth = right.depth(pass);
                for r in 0..ROWS {
                    let numbers = &mut numbers[..depth];
                    w.dequantize_padded(task * ROWS + r, start..start + depth, numbers);
                    let strip = &mut left[r / SIDE * SIDE * depth..];
                    for (tile, numbers) in numbers.chunks_exact(DEPTH).enumerate() {
                        multiplier.round(numbers, &mut strip[tile * TILE + r % SIDE * DEPTH..][..DEPTH]);
                    }
                }
                for block in 0..right.strips / 2 {
                    for top in 0..ROWS / BLOCK {
                        let strip = |s: usize| &left[s * SIDE * depth..][..SIDE * depth];
                        let strips = Strips {
                            left: [strip(2 * top), strip(2 * top + 1)],
                            right: [right.strip(pass, 2 * block), right.strip(pass, 2 * block + 1)],
                        };
                        let sums = &mut sums[(block * ROWS + top * BLOCK) * BLOCK..][..BLOCK * BLOCK];
                        multiplier.multiply_block(strips, sums, BLOCK);
                    }
                }
            }
            // The sums are W x^T, 32 tokens a block: they are turned while they are written.
            let here = task * ROWS..rows.min((task + 1) * ROWS);
            for token in 0..tokens {
                // SAFETY: these columns of the output are this task's alone.
                #[allow(unsafe_code)]
                let y = unsafe { out.slice(token, here.clone()) };
                let column = &sums[token / BLOCK * ROWS * BLOCK + token % BLOCK..];
                for (y, sum) in y.iter_mut().zip(column.iter().step_by(BLOCK)) {
                    *y = *sum;
                }
            }
        },
    );
}

fn backward_bf16(w: &FrozenMatrix, unit: Bf16Unit, dy: &[f32], dx: &mut [f32]) {
    let [rows, cols] = w.shape();
    let tokens = dy.len() / rows;
    let left = Packed::rows(unit, dy, rows, BACKWARD_DEPTH);
    let out = Columns::of(dx, cols);
    (0..cols.div_ceil(COLUMNS)).into_par_iter().for_each_init(
        || (vec![0.0; left.strips * SIDE * COLUMNS], vec![0; COLUMNS * BACKWARD_DEPTH], [[0.0; COLUMNS]; 2]),
        |(sums, right, numbers), task| {
            let multiplier = Multiplier::new(unit);
            let here = task * COLUMNS..cols.min((task + 1) * COLUMNS);
            let width = here.len().next_multiple_of(BLOCK);
            sums.fill(0.0);
            for (pass, start) in (0..rows).step_by(BACKWARD_DEPTH).enumerate() {
                let depth = left.depth(pass);
                for pair in 0..depth / 2 {
                    let row = start + 2 * pair;
                    w.dequantize_padded(row, here.start..here.start + width, &mut numbers[0][..width]);
                    w.dequantize_padded(row + 1, here.start..here.start + width, &mut numbers[1][..width]);
                    let at = pair / SIDE * TILE + pair % SIDE * DEPTH;
                    let rows = numbers[0].as_chunks().0.iter().zip(numbers[1].as_chunks().0);
                    for ((even, odd), strip) in rows.zip(right.chunks_exact_mut(SIDE * depth)) {
                        if let Some(pairs) = strip[at..].first_chunk_mut() {
                            multiplier.round_pairs(even, odd, pairs);
                        }
                    }
                }
                for block in 0..left.strips / 2 {
                    for side in 0..width / BLOCK {
                        let strip = |s: usize| &right[s * SIDE * depth..][..SIDE * depth];
                        let strips = Strips {
                            left: [left.strip(pass, 2 * block), left.strip(pass, 2 * block + 1)],
                            right: [strip(2 * side), strip(2 * side + 1)],
                        };
                        let sums = &mut sums[block * BLOCK * COLUMNS + side * BLOCK..];
                        multiplier.multiply_block(strips, sums, COLUMNS);
                    }
                }
            }
            for token in 0..tokens {
                // SAFETY: these columns of the output are this task's alone.
                #[allow(unsafe_code)]
                let dx = unsafe { out.slice(token, here.clone()) };
                dx.copy_from_slice(&sums[token * COLUMNS..][..here.len()]);
            }
        },
    );
}

/// Activations in bf16, in strips of 16 tokens, cut along the summed dimension into passes.
struct Packed {
    values: Vec<u16>,
    /// Strips of 16 tokens, an even number of them.
    strips: usize,
    /// The summed dimension, whole tiles.
    depth: usize,
    /// Of it in one pass.
    pass: usize,
}

impl Packed {
    /// Left tiles: rows of the activations, `[tokens, width]`.
    fn rows(unit: Bf16Unit, x: &[f32], width: usize, pass: usize) -> Self {
        Self::pack(unit, x, width, pass, |token, numbers, tile| {
            tile[token * DEPTH..][..DEPTH].copy_from_slice(numbers);
        })
    }

    /// Right tiles: pairs along the rows of the activations, so that these come out transposed.
    fn pairs_along_rows(unit: Bf16Unit, x: &[f32], width: usize, pass: usize) -> Self {
        Self::pack(unit, x, width, pass, |token, numbers, tile| {
            for (pair, two) in numbers.as_chunks::<2>().0.iter().enumerate() {
                tile[pair * DEPTH + 2 * token..][..2].copy_from_slice(two);
            }
        })
    }

    /// `place` puts 32 numbers of one of 16 tokens into its tile.
    fn pack(
        unit: Bf16Unit,
        x: &[f32],
        width: usize,
        pass: usize,
        place: impl Fn(usize, &[u16; DEPTH], &mut [u16]) + Sync,
    ) -> Self {
        let tokens = x.len() / width;
        let strips = tokens.next_multiple_of(BLOCK) / SIDE;
        let depth = width.next_multiple_of(DEPTH);
        let mut values = vec![0; strips * SIDE * depth];
        values.par_chunks_mut(strips * SIDE * pass).enumerate().for_each(|(i, values)| {
            let multiplier = Multiplier::new(unit);
            let deep = values.len() / (strips * SIDE);
            let columns = i * pass..width.min(i * pass + deep);
            for (strip, values) in values.chunks_exact_mut(SIDE * deep).enumerate() {
                for token in 0..SIDE.min(tokens.saturating_sub(strip * SIDE)) {
                    let row = &x[(strip * SIDE + token) * width..][columns.clone()];
                    for (numbers, tile) in row.chunks(DEPTH).zip(values.chunks_exact_mut(TILE)) {
                        let mut rounded = [0; DEPTH];
                        multiplier.round(numbers, &mut rounded[..numbers.len()]);
                        place(token, &rounded, tile);
                    }
                }
            }
        });
        Self { values, strips, depth, pass }
    }

    /// How deep pass `i` is.
    fn depth(&self, i: usize) -> usize {
        self.pass.min(self.depth - i * self.pass)
    }

    fn strip(&self, i: usize, strip: usize) -> &[u16] {
        let depth = self.depth(i);
        &self.values[i * self.pass * self.strips * SIDE + strip * SIDE * depth..][..SIDE * depth]
    }
}
