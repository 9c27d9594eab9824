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
use crate::direction::Direction;
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
/// A multiple of every format's block.
const BLOCKS_OF_ALL: usize = 256;
/// About how many columns are dequantized at a time in `forward`.
const FORWARD_DEPTH: usize = 512;
/// Columns of the matrix that one task of `backward` multiplies at most. A multiple of every format's block.
const COLUMNS: usize = 256;
/// About how many rows are dequantized at a time in `backward`.
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
                (Precision::Bf16, Some(unit)) => product_bf16(self, Direction::Forward, unit, x, y),
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
                (Precision::Bf16, Some(unit)) => product_bf16(self, Direction::Backward, unit, dy, dx),
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
    unsafe fn write(self, row: usize, columns: &Range<usize>, numbers: &[f32]) {
        let start = self.at(row, columns);
        assert_eq!(numbers.len(), columns.len(), "a number for every column");
        // SAFETY: within the columns that `at` has checked, and nobody else's.
        unsafe { start.copy_from_nonoverlapping(numbers.as_ptr(), numbers.len()) };
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
                        y.write(token, &(row..row + 1), &[sum]);
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

/// The product in one direction, in bf16: activations are packed once, and each task packs the part of the
/// matrix that its columns of the output need, a pass along the summed dimension at a time.
fn product_bf16(w: &FrozenMatrix, direction: Direction, unit: Bf16Unit, x: &[f32], y: Columns) {
    let [rows, cols] = w.shape();
    let (summed, width, pack): (_, _, PackRight) = match direction {
        Direction::Forward => (cols, rows, turned_rows),
        Direction::Backward => (rows, cols, paired_rows),
    };
    let left = Packed::new(unit, x, summed, depth_a_pass(direction, summed));
    let columns = columns_a_task(w, direction);
    let at_hand = (SIDE * left.pass).max(2 * columns);
    let sizes = (left.strips * SIDE * columns, columns * left.pass + at_hand, columns.max(left.pass));
    (0..width.div_ceil(columns)).into_par_iter().for_each(|task| {
        Scratch::with(sizes.0, sizes.1, sizes.2, |Scratch { sums, tiles, numbers }| {
            let multiplier = Multiplier::new(unit);
            let here = task * columns..width.min((task + 1) * columns);
            let blocks = here.len().div_ceil(BLOCK);
            let (right, rows_at_hand) = tiles.split_at_mut(blocks * BLOCK * left.pass);
            for pass in 0..left.passes() {
                let summed = left.summed(pass);
                let right = &mut right[..blocks * BLOCK * summed.len()];
                pack(w, &multiplier, here.start, summed.clone(), numbers, rows_at_hand, right);
                let right = |strip: usize| &right[strip * SIDE * summed.len()..][..SIDE * summed.len()];
                for block in 0..left.strips / 2 {
                    let left = [left.strip(pass, 2 * block), left.strip(pass, 2 * block + 1)];
                    for side in 0..blocks {
                        let strips = Strips { left, right: [right(2 * side), right(2 * side + 1)] };
                        let sums = &mut sums[block * BLOCK * columns + side * BLOCK..];
                        multiplier.multiply_block(strips, pass == 0, sums, columns);
                    }
                }
            }
            for token in 0..x.len() / left.width {
                // SAFETY: these columns of the output are this task's alone.
                #[allow(unsafe_code)]
                unsafe {
                    y.write(token, &here, &sums[token * columns..][..here.len()]);
                }
            }
        });
    });
}

/// Fills strips of right tiles with the part of a matrix that begins at a column of the output, along a part
/// of the summed dimension; the memory of single numbers and rows is lent.
type PackRight = fn(&FrozenMatrix, &Multiplier, usize, Range<usize>, &mut [f32], &mut [u16], &mut [u16]);

/// Fills strips of right tiles for `x W^T`: rows of the matrix from `first` on become their columns.
fn turned_rows(
    w: &FrozenMatrix,
    multiplier: &Multiplier,
    first: usize,
    summed: Range<usize>,
    numbers: &mut [f32],
    rows: &mut [u16],
    right: &mut [u16],
) {
    let depth = summed.len();
    let rows = &mut rows[..SIDE * depth];
    for (strip, tiles) in right.chunks_exact_mut(SIDE * depth).enumerate() {
        for (i, row) in rows.chunks_exact_mut(depth).enumerate() {
            rounded_row(w, multiplier, first + strip * SIDE + i, summed.clone(), numbers, row);
        }
        for (i, tile) in tiles.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
            multiplier.turn(&rows[i * DEPTH..], depth, tile);
        }
    }
}

/// Fills strips of right tiles for `dy W`: columns of the matrix from `first` on, two rows at a time.
fn paired_rows(
    w: &FrozenMatrix,
    multiplier: &Multiplier,
    first: usize,
    summed: Range<usize>,
    numbers: &mut [f32],
    rows: &mut [u16],
    right: &mut [u16],
) {
    let depth = summed.len();
    let width = right.len() / depth;
    let (even, odd) = rows[..2 * width].split_at_mut(width);
    for pair in 0..depth / 2 {
        let (row, at) = (summed.start + 2 * pair, pair / SIDE * TILE + pair % SIDE * DEPTH);
        rounded_row(w, multiplier, row, first..first + width, numbers, even);
        rounded_row(w, multiplier, row + 1, first..first + width, numbers, odd);
        let sixteens = even.as_chunks().0.iter().zip(odd.as_chunks().0);
        for ((even, odd), strip) in sixteens.zip(right.chunks_exact_mut(SIDE * depth)) {
            if let Some(pairs) = strip[at..].first_chunk_mut() {
                multiplier.pair(even, odd, pairs);
            }
        }
    }
}

/// How deep a pass along `summed` numbers is: whole blocks of every format, and passes of about one depth.
fn depth_a_pass(direction: Direction, summed: usize) -> usize {
    let depth = match direction {
        Direction::Forward => FORWARD_DEPTH,
        Direction::Backward => BACKWARD_DEPTH,
    };
    let passes = ((summed + depth / 2) / depth).max(1);
    summed.div_ceil(passes).next_multiple_of(BLOCKS_OF_ALL)
}

/// How many columns of the output a task computes: more of a wide one, so that the activations are read less
/// often; of a narrow one so few that there is work for every core.
fn columns_a_task(w: &FrozenMatrix, direction: Direction) -> usize {
    let [rows, cols] = w.shape();
    match direction {
        Direction::Forward if rows >= 32 * ROWS => 4 * ROWS,
        Direction::Forward => ROWS,
        Direction::Backward if cols >= 8 * COLUMNS => COLUMNS,
        Direction::Backward => w.column_step().max(BLOCK),
    }
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
    /// Numbers of a token.
    width: usize,
    /// The summed dimension: `width` in whole tiles.
    depth: usize,
    /// Of it in one pass.
    pass: usize,
}

impl Packed {
    /// Of `x`, `[tokens, width]`.
    fn new(unit: Bf16Unit, x: &[f32], width: usize, pass: usize) -> Self {
        let strips = (x.len() / width).next_multiple_of(BLOCK) / SIDE;
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
                        tile.as_chunks_mut().0[token] = rounded;
                    }
                }
            });
        }
        Self { values, strips, width, depth, pass }
    }

    fn passes(&self) -> usize {
        self.depth.div_ceil(self.pass)
    }

    /// What pass `i` sums over, in whole tiles: beyond the width there are zeros.
    fn summed(&self, i: usize) -> Range<usize> {
        i * self.pass..self.depth.min((i + 1) * self.pass)
    }

    fn strip(&self, i: usize, strip: usize) -> &[u16] {
        let depth = self.summed(i).len();
        &self.values[i * self.pass * self.strips * SIDE + strip * SIDE * depth..][..SIDE * depth]
    }
}
