//! Products with a frozen matrix, which stays in the format it is kept in: a tile of it is
//! dequantized, multiplied and forgotten.
//!
//! `forward` is `y = x W^T`, `backward` is `dx = dy W`, with `W` `[rows, cols]`. Sums are float32
//! in both precisions. Work is divided over the outputs, so results do not depend on the number of
//! threads.

use std::cell::{Cell, RefCell};
use std::ops::Range;

use burn::tensor::TensorData;
use rayon::prelude::*;

use super::FrozenMatrix;
use super::bf16_tiles::{BLOCK, Bf16Unit, DEPTH, Multiplier, SIDE, Strips, TILE};
use super::wide::widest;
use crate::dot::dot;

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
/// Rows of the matrix that one task of `forward` multiplies at least.
const ROWS: usize = BLOCK;
/// Columns dequantized at a time in `forward`. A multiple of every format's block.
const FORWARD_DEPTH: usize = 512;
/// Columns of the matrix that one task of `backward` multiplies at most. A multiple of every format's block.
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
        let mut y = Output::new(x.len() / cols, rows);
        for (i, x) in x.chunks(TOKENS * cols).enumerate() {
            let y = y.below(i * TOKENS);
            match (precision, Bf16Unit::detect()) {
                _ if x.len() <= FEW_TOKENS * cols => dot_products(self, x, y),
                (Precision::Bf16, Some(unit)) => forward_bf16(self, unit, x, y),
                _ => forward_f32(self, x, y),
            }
        }
        // SAFETY: each of the three writes every column of its tokens.
        #[allow(unsafe_code)]
        unsafe {
            y.written()
        }
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
        let mut dx = Output::new(dy.len() / rows, cols);
        for (i, dy) in dy.chunks(TOKENS * rows).enumerate() {
            let dx = dx.below(i * TOKENS);
            match (precision, Bf16Unit::detect()) {
                (Precision::Bf16, Some(unit)) => backward_bf16(self, unit, dy, dx),
                _ => backward_f32(self, dy, dx),
            }
        }
        // SAFETY: both write every column of their tokens.
        #[allow(unsafe_code)]
        unsafe {
            dx.written()
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

/// Numbers `cols` of `row` in bf16, with zeros behind the row's end and the last row: as they are
/// where the matrix holds bf16, otherwise dequantized into `numbers` first.
fn rounded_row(
    w: &FrozenMatrix,
    multiplier: &Multiplier,
    row: usize,
    cols: Range<usize>,
    numbers: &mut [f32],
    out: &mut [u16],
) {
    let [rows, width] = w.shape();
    let end = if row < rows { cols.end.min(width) } else { cols.start };
    let (here, beyond) = out.split_at_mut(end - cols.start);
    beyond.fill(0);
    if here.is_empty() {
        return;
    }
    if let Some(halves) = w.bf16(row, cols.start..end) {
        for (out, half) in here.iter_mut().zip(halves) {
            *out = u16::from_le_bytes(*half);
        }
    } else {
        let numbers = &mut numbers[..here.len()];
        w.dequantize(row, cols.start..end, numbers);
        multiplier.round(numbers, here);
    }
}

/// What a product is written to: memory that nothing has filled with zeros first.
struct Output {
    values: Vec<f32>,
    rows: usize,
    width: usize,
}

impl Output {
    fn new(rows: usize, width: usize) -> Self {
        Self { values: Vec::with_capacity(rows * width), rows, width }
    }

    /// From row `first` on.
    fn below(&mut self, first: usize) -> Columns {
        assert!(first <= self.rows);
        // SAFETY: within the allocation by the assertion.
        #[allow(unsafe_code)]
        let start = unsafe { self.values.as_mut_ptr().add(first * self.width) };
        Columns { start, rows: self.rows - first, width: self.width }
    }

    /// The numbers.
    ///
    /// # Safety
    /// All of them have been written.
    #[allow(unsafe_code)]
    unsafe fn written(mut self) -> Vec<f32> {
        // SAFETY: the capacity was asked for in `new`, and the caller has written it all.
        unsafe { self.values.set_len(self.rows * self.width) };
        self.values
    }
}

/// Rows of an output that tasks write disjoint columns of.
#[derive(Clone, Copy)]
struct Columns {
    start: *mut f32,
    rows: usize,
    width: usize,
}

// SAFETY: writing is unsafe and asks for disjoint columns.
#[allow(unsafe_code)]
unsafe impl Send for Columns {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Columns {}

impl Columns {
    /// Where `columns` of `row` begin.
    fn at(self, row: usize, columns: &Range<usize>) -> *mut f32 {
        assert!(row < self.rows && columns.start <= columns.end && columns.end <= self.width);
        // SAFETY: within the output by the assertion.
        #[allow(unsafe_code)]
        unsafe {
            self.start.add(row * self.width + columns.start)
        }
    }

    /// Writes `columns` of `row`.
    ///
    /// # Safety
    /// The output is still there, and no other task touches these columns.
    #[allow(unsafe_code)]
    unsafe fn write(self, row: usize, columns: &Range<usize>, mut numbers: impl Iterator<Item = f32>) {
        let start = self.at(row, columns);
        for i in 0..columns.len() {
            // SAFETY: within the columns that `at` has checked.
            unsafe { start.add(i).write(numbers.next().unwrap_or_default()) };
        }
    }
}

/// What a task needs beside its output. Kept by each thread: fresh memory would cost more than what
/// is computed in it.
#[derive(Default)]
struct Scratch {
    sums: Vec<f32>,
    tiles: Vec<u16>,
    numbers: Vec<f32>,
}

impl Scratch {
    /// At least so many of each; what is in them is left from earlier tasks.
    fn with<R>(sums: usize, tiles: usize, numbers: usize, task: impl FnOnce(&mut Self) -> R) -> R {
        thread_local! {
            static SCRATCH: RefCell<Scratch> = RefCell::default();
        }
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.sums.resize(sums.max(scratch.sums.len()), 0.0);
            scratch.tiles.resize(tiles.max(scratch.tiles.len()), 0);
            scratch.numbers.resize(numbers.max(scratch.numbers.len()), 0.0);
            task(scratch)
        })
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
                    let sum = widest(|| dot(x, numbers));
                    // SAFETY: this row of the matrix, a column of the output, is this task's alone.
                    #[allow(unsafe_code)]
                    unsafe {
                        y.write(token, &(row..row + 1), std::iter::once(sum));
                    }
                }
            }
        });
    });
}

/// A tile of rows is dequantized, then `y[:, tile] = x W[tile]^T`.
fn forward_f32(w: &FrozenMatrix, x: &[f32], y: Columns) {
    const TASK: usize = 8 * ROWS;
    let [rows, cols] = w.shape();
    let tokens = x.len() / cols;
    (0..rows.div_ceil(TASK)).into_par_iter().for_each(|task| {
        let here = task * TASK..rows.min((task + 1) * TASK);
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
    let columns = columns_a_task(w);
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

fn forward_bf16(w: &FrozenMatrix, unit: Bf16Unit, x: &[f32], y: Columns) {
    let [rows, cols] = w.shape();
    let (tokens, task_rows) = (x.len() / cols, rows_a_task(w));
    let right = Packed::pairs_along_rows(unit, x, cols, FORWARD_DEPTH);
    let sizes = (right.strips * SIDE * task_rows, (task_rows + 1) * FORWARD_DEPTH, FORWARD_DEPTH);
    (0..rows.div_ceil(task_rows)).into_par_iter().for_each(|task| {
        Scratch::with(sizes.0, sizes.1, sizes.2, |Scratch { sums, tiles, numbers }| {
            let (row, left) = tiles.split_at_mut(FORWARD_DEPTH);
            let multiplier = Multiplier::new(unit);
            for (pass, start) in (0..cols).step_by(FORWARD_DEPTH).enumerate() {
                let depth = right.depth(pass);
                for r in 0..task_rows {
                    let row = &mut row[..depth];
                    rounded_row(w, &multiplier, task * task_rows + r, start..start + depth, numbers, row);
                    let strip = &mut left[r / SIDE * SIDE * depth..];
                    let tiles = strip.as_chunks_mut::<TILE>().0.iter_mut();
                    for (tile, numbers) in tiles.zip(row.as_chunks::<DEPTH>().0) {
                        tile.as_chunks_mut::<DEPTH>().0[r % SIDE] = *numbers;
                    }
                }
                for block in 0..right.strips / 2 {
                    for top in 0..task_rows / BLOCK {
                        let strip = |s: usize| &left[s * SIDE * depth..][..SIDE * depth];
                        let strips = Strips {
                            left: [strip(2 * top), strip(2 * top + 1)],
                            right: [right.strip(pass, 2 * block), right.strip(pass, 2 * block + 1)],
                        };
                        let sums = &mut sums[(block * task_rows + top * BLOCK) * BLOCK..][..BLOCK * BLOCK];
                        multiplier.multiply_block(strips, pass == 0, sums, BLOCK);
                    }
                }
            }
            // The sums are W x^T, 32 tokens a block: they are turned while they are written.
            let here = task * task_rows..rows.min((task + 1) * task_rows);
            for token in 0..tokens {
                let column = &sums[token / BLOCK * task_rows * BLOCK + token % BLOCK..];
                // SAFETY: these columns of the output are this task's alone.
                #[allow(unsafe_code)]
                unsafe {
                    y.write(token, &here, column.iter().step_by(BLOCK).copied());
                }
            }
        });
    });
}

/// How many rows a task of `forward` takes: of a tall matrix more, so that each turn of the
/// activations is read less often.
fn rows_a_task(w: &FrozenMatrix) -> usize {
    let [rows, _] = w.shape();
    if rows >= 32 * ROWS { 4 * ROWS } else { ROWS }
}

fn backward_bf16(w: &FrozenMatrix, unit: Bf16Unit, dy: &[f32], dx: Columns) {
    let [rows, cols] = w.shape();
    let tokens = dy.len() / rows;
    let left = Packed::rows(unit, dy, rows, BACKWARD_DEPTH);
    let columns = columns_a_task(w);
    let sizes = (left.strips * SIDE * columns, columns * (BACKWARD_DEPTH + 2), columns);
    (0..cols.div_ceil(columns)).into_par_iter().for_each(|task| {
        Scratch::with(sizes.0, sizes.1, sizes.2, |Scratch { sums, tiles, numbers }| {
            let (rows_at_hand, right) = tiles.split_at_mut(2 * columns);
            let (even, odd) = rows_at_hand.split_at_mut(columns);
            let multiplier = Multiplier::new(unit);
            let here = task * columns..cols.min((task + 1) * columns);
            let width = here.len().next_multiple_of(BLOCK);
            for (pass, start) in (0..rows).step_by(BACKWARD_DEPTH).enumerate() {
                let depth = left.depth(pass);
                for pair in 0..depth / 2 {
                    let (row, at) = (start + 2 * pair, pair / SIDE * TILE + pair % SIDE * DEPTH);
                    let (even, odd) = (&mut even[..width], &mut odd[..width]);
                    rounded_row(w, &multiplier, row, here.start..here.start + width, numbers, even);
                    rounded_row(w, &multiplier, row + 1, here.start..here.start + width, numbers, odd);
                    let sixteens = even.as_chunks::<SIDE>().0.iter().zip(odd.as_chunks::<SIDE>().0);
                    for ((even, odd), strip) in sixteens.zip(right.chunks_exact_mut(SIDE * depth)) {
                        let (pairs, _) = strip[at..][..DEPTH].as_chunks_mut::<2>();
                        for ((pair, &even), &odd) in pairs.iter_mut().zip(even).zip(odd) {
                            *pair = [even, odd];
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
                        let sums = &mut sums[block * BLOCK * columns + side * BLOCK..];
                        multiplier.multiply_block(strips, pass == 0, sums, columns);
                    }
                }
            }
            for token in 0..tokens {
                let sums = &sums[token * columns..][..here.len()];
                // SAFETY: these columns of the output are this task's alone.
                #[allow(unsafe_code)]
                unsafe {
                    dx.write(token, &here, sums.iter().copied());
                }
            }
        });
    });
}

/// How wide a task of `backward` is: narrow matrices still have work for every core.
fn columns_a_task(w: &FrozenMatrix) -> usize {
    let [_, cols] = w.shape();
    if cols >= 8 * COLUMNS { COLUMNS } else { w.column_step().max(2 * BLOCK) }
}

thread_local! {
    /// Memory that an earlier product packed its activations in.
    static PACKED: Cell<Vec<u16>> = const { Cell::new(Vec::new()) };
}

impl Drop for Packed {
    fn drop(&mut self) {
        PACKED.set(std::mem::take(&mut self.values));
    }
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
            tile.as_chunks_mut::<DEPTH>().0[token] = *numbers;
        })
    }

    /// Right tiles: pairs along the rows of the activations, so that these come out transposed.
    fn pairs_along_rows(unit: Bf16Unit, x: &[f32], width: usize, pass: usize) -> Self {
        Self::pack(unit, x, width, pass, |token, numbers, tile| {
            let (pairs, _) = tile.as_chunks_mut::<2>();
            for (pair, two) in pairs.iter_mut().skip(token).step_by(SIDE).zip(numbers.as_chunks::<2>().0) {
                *pair = *two;
            }
        })
    }

    /// `place` puts 32 numbers of one of 16 tokens into its tile.
    fn pack(
        unit: Bf16Unit,
        x: &[f32],
        width: usize,
        pass: usize,
        place: impl Fn(usize, &[u16; DEPTH], &mut [u16; TILE]) + Sync,
    ) -> Self {
        let tokens = x.len() / width;
        let strips = tokens.next_multiple_of(BLOCK) / SIDE;
        let depth = width.next_multiple_of(DEPTH);
        let mut values = PACKED.take();
        let needed = strips * SIDE * depth;
        values.resize(needed.max(values.len()), 0);
        for (i, values) in values[..needed].chunks_mut(strips * SIDE * pass).enumerate() {
            let deep = values.len() / (strips * SIDE);
            let columns = i * pass..width.min(i * pass + deep);
            values.par_chunks_exact_mut(SIDE * deep).enumerate().for_each(|(strip, values)| {
                let multiplier = Multiplier::new(unit);
                for token in 0..SIDE {
                    // Behind the last token, and behind a row's end, there are zeros.
                    let row = x.chunks_exact(width).nth(strip * SIDE + token);
                    let mut numbers = row.map_or(&[][..], |row| &row[columns.clone()]).chunks(DEPTH);
                    for tile in values.as_chunks_mut::<TILE>().0 {
                        let mut rounded = [0; DEPTH];
                        if let Some(numbers) = numbers.next() {
                            multiplier.round(numbers, &mut rounded[..numbers.len()]);
                        }
                        place(token, &rounded, tile);
                    }
                }
            });
        }
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
