//! Products with a frozen matrix in bf16: both sides are packed into tiles.

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use super::FrozenMatrix;
use super::output::{Columns, Scratch};
use super::product::columns_a_task;
use crate::bf16::{
    BLOCK, Bf16Unit, DEPTH, Multiplier, RoundedRows, SIDE, Strips, Sums, left_strip, paired_rows, turned_rows,
};
use crate::cache_line::prefetch;
use crate::direction::Direction;
use crate::scratch::grown;

/// A multiple of every format's block.
const BLOCKS_OF_ALL: usize = 256;
/// About how many columns are dequantized at a time in `forward`.
const FORWARD_DEPTH: usize = 512;
/// About how many rows are dequantized at a time in `backward`.
const BACKWARD_DEPTH: usize = 512;

/// The product in one direction, in bf16: activations are packed once, and each task packs the part of the
/// matrix that its columns of the output need, a pass along the summed dimension at a time.
pub(super) fn product_bf16(w: &FrozenMatrix, direction: Direction, unit: Bf16Unit, x: &[f32], y: Columns) {
    let [summed, width] = w.widths(direction);
    let pack: PackRight = match direction {
        Direction::Forward => turned_rows,
        Direction::Backward => paired_rows,
    };
    let left = Packed::new(unit, x, summed, depth_a_pass(direction, summed));
    let (tokens, passes) = (x.len() / summed, left.passes());
    let columns = columns_a_task(w, direction);
    let at_hand = (SIDE * left.pass).max(2 * columns);
    let sizes = (left.strips * SIDE * columns, columns * left.pass + at_hand, columns.max(left.pass));
    (0..width.div_ceil(columns)).into_par_iter().for_each(|task| {
        let here = task * columns..width.min((task + 1) * columns);
        Scratch::with(sizes.0, sizes.1, sizes.2, |Scratch { sums, tiles, numbers }| {
            let multiplier = Multiplier::new(unit);
            let sides = here.len().div_ceil(BLOCK);
            let (right, rows_at_hand) = tiles.split_at_mut(sides * BLOCK * left.pass);
            for pass in 0..passes {
                let summed = left.summed(pass);
                let right = &mut right[..sides * BLOCK * summed.len()];
                pack(w, &multiplier, here.start, summed.clone(), numbers, rows_at_hand, right);
                let right = |strip: usize| &right[strip * SIDE * summed.len()..][..SIDE * summed.len()];
                let blocks = (0..left.strips / 2).flat_map(|block| (0..sides).map(move |side| (block, side)));
                for ((block, side), sums) in blocks.zip(sums.as_chunks_mut().0) {
                    let left = [left.strip(pass, 2 * block), left.strip(pass, 2 * block + 1)];
                    let right = [right(2 * side), right(2 * side + 1)];
                    let strips = Strips { left, right };
                    let tokens = block * BLOCK..tokens.min((block + 1) * BLOCK);
                    let columns = here.start + side * BLOCK..here.end.min(here.start + (side + 1) * BLOCK);
                    // SAFETY: these columns of the output are this task's alone.
                    #[allow(unsafe_code)]
                    let place = unsafe { Place::new(y, tokens, columns) };
                    place.add(&multiplier, strips, sums, pass == 0, pass + 1 == passes);
                }
            }
        });
    });
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

    /// Adds the product of `strips` to the `sums` of the passes before, if this is not the `first`; the `last` goes to
    /// where it belongs, while the next one is being multiplied.
    fn add(
        &self,
        multiplier: &Multiplier,
        strips: Strips,
        sums: &mut [f32; BLOCK * BLOCK],
        first: bool,
        last: bool,
    ) {
        let Self { y, tokens, columns } = self;
        if last && let Some(out) = y.block(tokens, columns) {
            let before = Sums { start: sums.as_mut_ptr(), stride: BLOCK };
            // SAFETY: the sums are ours, and so is the part of the output, by what `new` asks for.
            #[allow(unsafe_code)]
            unsafe {
                multiplier.multiply_to(strips, (!first).then_some(before), out);
            }
            return;
        }
        multiplier.multiply_block(strips, first, sums, BLOCK);
        if last {
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
fn depth_a_pass(direction: Direction, summed: usize) -> usize {
    let depth = match direction {
        Direction::Forward => FORWARD_DEPTH,
        Direction::Backward => BACKWARD_DEPTH,
    };
    let passes = ((summed + depth / 2) / depth).max(1);
    summed.div_ceil(passes).next_multiple_of(BLOCKS_OF_ALL)
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
    /// The summed dimension in whole tiles.
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
        for (i, values) in
            grown(&mut values, strips * SIDE * depth).chunks_mut(strips * SIDE * pass).enumerate()
        {
            let deep = values.len() / (strips * SIDE);
            let columns = i * pass..width.min(i * pass + deep);
            values.par_chunks_exact_mut(SIDE * deep).enumerate().for_each(|(strip, values)| {
                let rows = x.chunks_exact(width).skip(strip * SIDE).take(SIDE);
                left_strip(&Multiplier::new(unit), rows.map(|row| &row[columns.clone()]), values);
            });
        }
        Self { values, strips, depth, pass }
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
