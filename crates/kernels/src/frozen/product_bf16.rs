//! Products with a frozen matrix in bf16: both sides are packed into tiles.

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use super::FrozenMatrix;
use super::output::{Columns, Scratch};
use super::product::{column_step, columns_a_task};
use crate::bf16::{
    BLOCK, Bf16Unit, DEPTH, Multiplier, RoundedRows, SIDE, Strips, Sums, TILE, left_strip, paired_rows,
    turned_rows,
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
    packed_activations(unit, &[(x, cols)], FORWARD_DEPTH, |left| {
        each_product(unit, products, &left[0], x.len() / cols);
    });
}

/// The same, with `x` packed.
pub(super) fn each_product(
    unit: Bf16Unit,
    products: &[(&FrozenMatrix, Columns)],
    left: &Packed,
    tokens: usize,
) {
    let about = columns_a_task(products.iter().map(|(w, _)| w.shape()[0]).sum(), BLOCK);
    let tasks = products.iter().flat_map(|&(w, y)| {
        let [rows, _] = w.shape();
        let columns = rows.div_ceil(parts(rows, about)).next_multiple_of(BLOCK);
        (0..rows).step_by(columns).map(move |start| (w, y, start..rows.min(start + columns)))
    });
    let tasks: Vec<_> = tasks.collect();
    tasks.into_par_iter().for_each(|(w, y, here)| {
        // SAFETY: these columns of the output are this task's alone.
        #[allow(unsafe_code)]
        let take = unsafe { to_places(y, 0..tokens, here.clone()) };
        Task { unit, pack: turned_rows, here }.run(&[(w, left)], take);
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
        // SAFETY: these columns of the output are this task's alone.
        #[allow(unsafe_code)]
        let take = unsafe { to_places(dx, 0..tokens, here.clone()) };
        Task { unit, pack: paired_rows, here }.run(&terms, take);
    });
}

/// Some columns of an output, which a thread computes.
pub(super) struct Task {
    pub(super) unit: Bf16Unit,
    pub(super) pack: PackRight,
    pub(super) here: Range<usize>,
}

/// What a task has to do: to multiply a block's strips and add them to the sums of the passes before.
pub(super) struct Step<'a> {
    pub(super) strips: Strips<'a>,
    /// Of the passes before, unless this is the `first`.
    pub(super) sums: &'a mut [f32; BLOCK * BLOCK],
    pub(super) first: bool,
    /// No pass comes behind.
    pub(super) last: bool,
    /// Which block of tokens, and which of the task's columns.
    pub(super) at: [usize; 2],
}

impl Task {
    /// Sums what the terms are, activations times a matrix: a pass along the summed dimension at a time, for each of which
    /// the part of the matrix that these columns need is packed, and `take` does every block's step.
    pub(super) fn run(&self, terms: &[(&FrozenMatrix, &Packed)], take: impl Fn(&Multiplier, Step)) {
        let Self { unit, pack, here } = self;
        let (sides, cut) = (here.len().div_ceil(BLOCK), terms[0].1.cut);
        let (columns, deepest) =
            (sides * BLOCK, terms.iter().map(|(_, left)| left.cut.pass).fold(0, usize::max));
        let at_hand = (SIDE * deepest).max(2 * columns);
        let passes: Vec<_> = terms
            .iter()
            .flat_map(|&(w, left)| (0..left.cut.passes()).map(move |pass| (w, left, pass)))
            .collect();
        // What takes one pass is done with right away.
        let sums = if passes.len() == 1 { 1 } else { cut.blocks(sides).count() };
        let sizes = (sums * BLOCK * BLOCK, columns * deepest + at_hand, columns.max(deepest));
        Scratch::with(sizes.0, sizes.1, sizes.2, |Scratch { sums: memory, tiles, numbers }| {
            let multiplier = Multiplier::new(*unit);
            let (right, rows_at_hand) = tiles.split_at_mut(columns * deepest);
            let memory = memory.as_chunks_mut().0;
            for (i, &(w, left, pass)) in passes.iter().enumerate() {
                let summed = left.cut.summed(pass);
                let right = &mut right[..columns * summed.len()];
                pack(w, &multiplier, here.start, summed.clone(), numbers, rows_at_hand, right);
                let (first, last) = (i == 0, i + 1 == passes.len());
                for (i, (block, side)) in cut.blocks(sides).enumerate() {
                    let right = block_strips(right, summed.len(), side);
                    let strips = Strips { left: left.block(pass, block), right };
                    let sums = &mut memory[i % sums];
                    take(&multiplier, Step { strips, sums, first, last, at: [block, side] });
                }
            }
        });
    }
}

/// Steps that write to columns `here` of an output.
///
/// # Safety
/// No other task touches these columns.
#[allow(unsafe_code)]
unsafe fn to_places(y: Columns<'_>, tokens: Range<usize>, here: Range<usize>) -> impl Fn(&Multiplier, Step) {
    move |multiplier, step| {
        let [block, side] = step.at;
        // SAFETY: by what is asked for.
        let place = unsafe { Place::new(y, block_of(&tokens, block), block_of(&here, side)) };
        place.add(multiplier, step);
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

    /// Adds a product to the sums of the passes before, or to what the output is added to if this is the first; the last
    /// goes to where it belongs, while the next one is being multiplied.
    fn add(&self, multiplier: &Multiplier, step: Step) {
        let Self { y, tokens, columns } = self;
        let Step { strips, sums, first, last, .. } = step;
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
fn block_of(numbers: &Range<usize>, i: usize) -> Range<usize> {
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
    with_room(cuts.iter().map(|cut| cut.numbers()).sum(), |mut room| {
        let packed = activations.iter().zip(cuts).map(|(&(x, width), cut)| {
            let (here, rest) = std::mem::take(&mut room).split_at_mut(cut.numbers());
            room = rest;
            cut.pack(unit, x, width, here)
        });
        multiply(&packed.collect::<Vec<_>>())
    })
}

/// Lends room for `numbers`, in which earlier products packed their activations.
pub(super) fn with_room<R>(numbers: usize, f: impl FnOnce(&mut [u16]) -> R) -> R {
    thread_local! {
        static ROOM: Cell<Vec<u16>> = const { Cell::new(Vec::new()) };
    }
    let mut room = ROOM.take();
    let result = f(grown(&mut room, numbers));
    ROOM.set(room);
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

    pub(super) fn numbers(self) -> usize {
        self.strips * SIDE * self.depth
    }

    /// `x`, `[tokens, width]`, in `memory`.
    pub(super) fn pack<'a>(
        self,
        unit: Bf16Unit,
        x: &[f32],
        width: usize,
        memory: &'a mut [u16],
    ) -> Packed<'a> {
        let Self { strips, pass, .. } = self;
        for (i, values) in memory.chunks_mut(strips * SIDE * pass).enumerate() {
            let deep = values.len() / (strips * SIDE);
            let columns = i * pass..width.min(i * pass + deep);
            values.par_chunks_exact_mut(SIDE * deep).enumerate().for_each(|(strip, values)| {
                let rows = x.chunks_exact(width).skip(strip * SIDE).take(SIDE);
                left_strip(&Multiplier::new(unit), rows.map(|row| &row[columns.clone()]), values);
            });
        }
        Packed { values: memory, cut: self }
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
    pub(super) values: &'a [u16],
    pub(super) cut: Cut,
}

/// Room for activations in bf16, of which tasks write disjoint blocks.
pub(super) struct Room<'a> {
    /// A row of each is a strip.
    passes: Vec<Columns<'a, u16>>,
    cut: Cut,
}

// A block is a tile of each of two strips.
const _: () = assert!(BLOCK == DEPTH && BLOCK == 2 * SIDE);

impl<'a> Room<'a> {
    pub(super) fn of(memory: &'a mut [u16], cut: Cut) -> Self {
        let Cut { strips, pass, .. } = cut;
        let passes = memory.chunks_mut((strips * SIDE * pass).max(1)).map(|pass| {
            let width = pass.len() / strips;
            Columns::over(pass, width)
        });
        Self { passes: passes.collect(), cut }
    }

    /// Writes the numbers of a block: which one of tokens, and which of columns.
    ///
    /// # Safety
    /// No other task touches this block.
    #[allow(unsafe_code)]
    pub(super) unsafe fn put(
        &self,
        multiplier: &Multiplier,
        numbers: &[f32; BLOCK * BLOCK],
        [block, side]: [usize; 2],
    ) {
        let (pass, tile) = (side * BLOCK / self.cut.pass, side * BLOCK % self.cut.pass / DEPTH);
        for (half, numbers) in numbers.as_chunks::<TILE>().0.iter().enumerate() {
            let mut rounded = [0; TILE];
            multiplier.round(numbers, &mut rounded);
            // SAFETY: by what is asked for.
            unsafe { self.passes[pass].copy(2 * block + half, &(tile * TILE..(tile + 1) * TILE), &rounded) };
        }
    }
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
