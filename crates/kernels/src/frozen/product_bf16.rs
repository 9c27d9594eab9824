//! Products with a frozen matrix in bf16: both sides are packed into tiles.

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use super::FrozenMatrix;
use super::output::{Columns, Scratch};
use super::product::{column_step, columns_a_task};
use crate::bf16::{
    BLOCK, Bf16Unit, DEPTH, Multiplier, RoundedRows, SIDE, Strips, Sums, left_strip, paired_rows, turned_rows,
};
use crate::cache_line::prefetch;
use crate::scratch::grown;

/// A multiple of every format's block.
const BLOCKS_OF_ALL: usize = 256;
/// About how many columns are dequantized at a time in `forward`.
pub(super) const FORWARD_DEPTH: usize = 512;
/// About how many rows are dequantized at a time in `backward`.
pub(super) const BACKWARD_DEPTH: usize = 512;

/// `x W^T` of matrices of one width, each to the place beside it. Activations are packed once.
pub(super) fn forward_bf16(unit: Bf16Unit, products: &[(&FrozenMatrix, Columns)], x: &[f32]) {
    let cols = products[0].0.shape()[1];
    let about = columns_a_task(products.iter().map(|(w, _)| w.shape()[0]).sum(), BLOCK);
    let tasks = products.iter().flat_map(|&(w, y)| {
        let [rows, _] = w.shape();
        let columns = rows.div_ceil(parts(rows, about)).next_multiple_of(BLOCK);
        (0..rows).step_by(columns).map(move |start| (w, y, start..rows.min(start + columns)))
    });
    let tasks: Vec<_> = tasks.collect();
    packed_activations(unit, &[(x, cols)], FORWARD_DEPTH, |left| {
        tasks.into_par_iter().for_each(|(w, y, here)| {
            let task = Task { unit, pack: turned_rows, tokens: x.len() / cols, here };
            task.run(&[(w, &left[0])], y);
        });
    });
}

/// The sum of `dy W` over matrices of one width, each with its `dy`.
pub(super) fn backward_bf16(unit: Bf16Unit, terms: &[(&FrozenMatrix, &[f32])], dx: Columns) {
    let [rows, _] = terms[0].0.shape();
    let tokens = terms[0].1.len() / rows;
    let dys: Vec<_> = terms.iter().map(|(w, dy)| (*dy, w.shape()[0])).collect();
    let matrices: Vec<_> = terms.iter().map(|(w, _)| *w).collect();
    packed_activations(unit, &dys, BACKWARD_DEPTH, |left| sum_of_products(unit, &matrices, left, tokens, dx));
}

/// The same, with every `dy` packed.
pub(super) fn sum_of_products(
    unit: Bf16Unit,
    matrices: &[&FrozenMatrix],
    left: &[Packed],
    tokens: usize,
    dx: Columns,
) {
    let [_, cols] = matrices[0].shape();
    let columns = columns_a_task(cols, column_step(matrices));
    let terms: Vec<_> = matrices.iter().copied().zip(left).collect();
    (0..cols.div_ceil(columns)).into_par_iter().for_each(|task| {
        let here = task * columns..cols.min((task + 1) * columns);
        Task { unit, pack: paired_rows, tokens, here }.run(&terms, dx);
    });
}

/// Some columns of an output, which a thread computes.
struct Task {
    unit: Bf16Unit,
    pack: PackRight,
    tokens: usize,
    here: Range<usize>,
}

impl Task {
    /// Sums what the terms are, activations times a matrix: a pass along the summed dimension at a time, for each of which
    /// the part of the matrix that these columns need is packed.
    fn run(&self, terms: &[(&FrozenMatrix, &Packed)], y: Columns) {
        let Self { unit, pack, tokens, here } = self;
        let (sides, strips) = (here.len().div_ceil(BLOCK), terms[0].1.cut.strips);
        let (columns, deepest) =
            (sides * BLOCK, terms.iter().map(|(_, left)| left.cut.pass).fold(0, usize::max));
        let at_hand = (SIDE * deepest).max(2 * columns);
        let sizes = (strips * SIDE * columns, columns * deepest + at_hand, columns.max(deepest));
        let passes: Vec<_> = terms
            .iter()
            .flat_map(|&(w, left)| (0..left.cut.passes()).map(move |pass| (w, left, pass)))
            .collect();
        Scratch::with(sizes.0, sizes.1, sizes.2, |Scratch { sums, tiles, numbers }| {
            let multiplier = Multiplier::new(*unit);
            let (right, rows_at_hand) = tiles.split_at_mut(columns * deepest);
            for (i, &(w, left, pass)) in passes.iter().enumerate() {
                let summed = left.cut.summed(pass);
                let right = &mut right[..columns * summed.len()];
                pack(w, &multiplier, here.start, summed.clone(), numbers, rows_at_hand, right);
                for ((block, side), sums) in left.cut.blocks(sides).zip(sums.as_chunks_mut().0) {
                    let right = block_strips(right, summed.len(), side);
                    let strips = Strips { left: left.block(pass, block), right };
                    // SAFETY: these columns of the output are this task's alone.
                    #[allow(unsafe_code)]
                    let place =
                        unsafe { Place::new(y, block_of(&(0..*tokens), block), block_of(here, side)) };
                    place.add(&multiplier, strips, sums, i == 0, i + 1 == passes.len());
                }
            }
        });
    }
}

/// Where 32 x 32 numbers of the output belong, or what is left of so many at its edges.
struct Place<'a> {
    y: Columns<'a>,
    tokens: Range<usize>,
    columns: Range<usize>,
}

impl<'a> Place<'a> {
    /// # Safety
    /// No other task touches these columns.
    #[allow(unsafe_code)]
    unsafe fn new(y: Columns<'a>, tokens: Range<usize>, columns: Range<usize>) -> Self {
        Self { y, tokens, columns }
    }

    /// Adds the product of `strips` to the `sums` of the passes before, or to what the output is added to if this is the
    /// `first`; the `last` goes to where it belongs, while the next one is being multiplied.
    fn add(
        &self,
        multiplier: &Multiplier,
        strips: Strips,
        sums: &mut [f32; BLOCK * BLOCK],
        first: bool,
        last: bool,
    ) {
        let Self { y, tokens, columns } = self;
        let whole = y.block(tokens, columns);
        let kept = Sums { start: sums.as_mut_ptr(), stride: BLOCK };
        let before = if first { y.block_onto(tokens, columns) } else { Some(kept) };
        // SAFETY: the sums are ours, and so is the part of the output, by what `new` asks for; nobody writes what it is
        // added to.
        #[allow(unsafe_code)]
        unsafe {
            multiplier.multiply_to(strips, before, whole.filter(|_| last).unwrap_or(kept));
        }
        if last && whole.is_none() {
            for (token, row) in tokens.clone().zip(sums.as_chunks::<BLOCK>().0) {
                // SAFETY: by what `new` asks for.
                #[allow(unsafe_code)]
                unsafe {
                    y.write(token, columns, &row[..columns.len()]);
                }
            }
        }
    }
}

/// Fills strips of right tiles with the part of a matrix that begins at a column of the output, along a part
/// of the summed dimension; the memory of single numbers and rows is lent.
type PackRight = fn(&FrozenMatrix, &Multiplier, usize, Range<usize>, &mut [f32], &mut [u16], &mut [u16]);

/// How deep a pass along `summed` numbers is: whole blocks of every format, and passes of about one depth.
fn depth_a_pass(about: usize, summed: usize) -> usize {
    summed.div_ceil(parts(summed, about)).next_multiple_of(BLOCKS_OF_ALL)
}

/// How many parts of about one length there are.
fn parts(length: usize, about: usize) -> usize {
    ((length + about / 2) / about).max(1)
}

/// Block `i` of some tokens or columns, or what is left of it at their end.
pub(super) fn block_of(numbers: &Range<usize>, i: usize) -> Range<usize> {
    let start = numbers.start + i * BLOCK;
    start..numbers.end.min(start + BLOCK)
}

/// Both strips of block `i` in tiles that are `depth` deep.
pub(super) fn block_strips(tiles: &[u16], depth: usize, i: usize) -> [&[u16]; 2] {
    [2 * i, 2 * i + 1].map(|strip| &tiles[strip * SIDE * depth..][..SIDE * depth])
}

/// Has `multiply` do so with `activations`, each with the width of its rows, packed for passes of about `depth`.
pub(super) fn packed_activations<R>(
    unit: Bf16Unit,
    activations: &[(&[f32], usize)],
    depth: usize,
    multiply: impl FnOnce(&[Packed]) -> R,
) -> R {
    let cuts: Vec<_> = activations.iter().map(|(x, width)| Cut::new(x.len(), *width, depth)).collect();
    let pack = |memory: Vec<&mut [u16]>| {
        for ((&(x, width), cut), memory) in activations.iter().zip(&cuts).zip(memory) {
            cut.pack(unit, x, width, memory);
        }
    };
    packed_by(&cuts, pack, multiply)
}

/// Has `multiply` do so with what `pack` writes to as many pieces of memory as there are cuts.
pub(super) fn packed_by<R>(
    cuts: &[Cut],
    pack: impl FnOnce(Vec<&mut [u16]>),
    multiply: impl FnOnce(&[Packed]) -> R,
) -> R {
    thread_local! {
        /// Memory that earlier products packed their activations in.
        static MEMORY: Cell<Vec<u16>> = const { Cell::new(Vec::new()) };
    }
    let mut memory = MEMORY.take();
    let mut rest = grown(&mut memory, cuts.iter().map(Cut::numbers).sum());
    pack(cuts.iter().filter_map(|cut| rest.split_off_mut(..cut.numbers())).collect());
    let mut rest = &memory[..];
    let part = |cut: &Cut| Some(Packed { values: rest.split_off(..cut.numbers())?, cut: *cut });
    let result = multiply(&cuts.iter().filter_map(part).collect::<Vec<_>>());
    MEMORY.set(memory);
    result
}

/// How rows are packed: in strips of 16 of them, cut along the summed dimension into passes.
#[derive(Clone, Copy)]
pub(super) struct Cut {
    /// An even number of them.
    pub(super) strips: usize,
    /// The summed dimension in whole tiles.
    depth: usize,
    /// Of it in one pass.
    pub(super) pass: usize,
}

impl Cut {
    /// Of `numbers` in rows of `width`.
    pub(super) fn new(numbers: usize, width: usize, about: usize) -> Self {
        let strips = (numbers / width).next_multiple_of(BLOCK) / SIDE;
        Self { strips, depth: width.next_multiple_of(DEPTH), pass: depth_a_pass(about, width) }
    }

    fn numbers(&self) -> usize {
        self.strips * SIDE * self.depth
    }

    /// `x`, `[tokens, width]`, in `memory`.
    fn pack(&self, unit: Bf16Unit, x: &[f32], width: usize, memory: &mut [u16]) {
        let Self { strips, pass, .. } = *self;
        for (i, values) in memory.chunks_mut(strips * SIDE * pass).enumerate() {
            let deep = values.len() / (strips * SIDE);
            let columns = i * pass..width.min(i * pass + deep);
            values.par_chunks_exact_mut(SIDE * deep).enumerate().for_each(|(strip, values)| {
                let rows = x.chunks_exact(width).skip(strip * SIDE).take(SIDE);
                left_strip(&Multiplier::new(unit), rows.map(|row| &row[columns.clone()]), values);
            });
        }
    }

    pub(super) fn passes(&self) -> usize {
        self.depth.div_ceil(self.pass)
    }

    /// Blocks of tokens, each with all of `sides` blocks of columns.
    pub(super) fn blocks(&self, sides: usize) -> impl Iterator<Item = (usize, usize)> {
        (0..self.strips / 2).flat_map(move |block| (0..sides).map(move |side| (block, side)))
    }

    /// What pass `i` sums over, in whole tiles: beyond the width there are zeros.
    pub(super) fn summed(&self, i: usize) -> Range<usize> {
        i * self.pass..self.depth.min((i + 1) * self.pass)
    }
}

/// Activations in bf16.
pub(super) struct Packed<'a> {
    values: &'a [u16],
    pub(super) cut: Cut,
}

impl Packed<'_> {
    /// Both strips of block `i`, as pass `pass` needs them.
    pub(super) fn block(&self, pass: usize, i: usize) -> [&[u16]; 2] {
        let Cut { strips, pass: deepest, .. } = self.cut;
        block_strips(&self.values[pass * deepest * strips * SIDE..], self.cut.summed(pass).len(), i)
    }
}

impl RoundedRows for FrozenMatrix {
    fn shape(&self) -> [usize; 2] {
        self.shape()
    }

    fn kept(&self, row: usize, cols: Range<usize>) -> Option<&[u16]> {
        self.bf16(row, cols)
    }

    fn round_row(
        &self,
        multiplier: &Multiplier,
        row: usize,
        cols: Range<usize>,
        numbers: &mut [f32],
        out: &mut [u16],
    ) {
        let numbers = &mut numbers[..out.len()];
        self.dequantize(row, cols, numbers);
        multiplier.round(numbers, out);
    }

    fn ask_for(&self, row: usize, cols: Range<usize>) {
        prefetch(self.stored(row, cols));
    }
}
