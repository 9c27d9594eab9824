//! From rows of numbers to the tiles of both sides of a product.

use std::ops::Range;

use super::tiles::{DEPTH, Multiplier, SIDE, TILE};

/// How far ahead of what is packed rows are asked for.
const ROWS_AHEAD: usize = 16;

/// The rows of a matrix, which can be had in bf16.
pub(crate) trait RoundedRows {
    /// `[rows, cols]`.
    fn shape(&self) -> [usize; 2];

    /// Numbers `cols` of `row`, which are there. `numbers` is memory for as many floats.
    fn round_row(
        &self,
        multiplier: &Multiplier,
        row: usize,
        cols: Range<usize>,
        numbers: &mut [f32],
        out: &mut [u16],
    );

    /// Asks for numbers that will be rounded soon, where there are such and they lie in memory.
    fn ask_for(&self, _row: usize, _cols: Range<usize>) {}

    /// The same as [`Self::round_row`], with zeros behind the row's end and the last row.
    fn rounded(
        &self,
        multiplier: &Multiplier,
        row: usize,
        cols: Range<usize>,
        numbers: &mut [f32],
        out: &mut [u16],
    ) {
        let [rows, width] = self.shape();
        let end = if row < rows { cols.end.min(width) } else { cols.start };
        let (here, beyond) = out.split_at_mut(end - cols.start);
        beyond.fill(0);
        if !here.is_empty() {
            self.round_row(multiplier, row, cols.start..end, numbers, here);
        }
    }
}

/// Fills a strip of left tiles with rows, 16 at most; behind the last, and behind a row's end, there are zeros.
pub(crate) fn left_strip<'a>(
    multiplier: &Multiplier,
    mut rows: impl Iterator<Item = &'a [f32]>,
    tiles: &mut [u16],
) {
    for i in 0..SIDE {
        let mut numbers = rows.next().unwrap_or_default().chunks(DEPTH);
        for tile in tiles.as_chunks_mut::<TILE>().0 {
            let mut rounded = [0; DEPTH];
            if let Some(numbers) = numbers.next() {
                multiplier.round(numbers, &mut rounded[..numbers.len()]);
            }
            tile.as_chunks_mut().0[i] = rounded;
        }
    }
}

/// Fills strips of right tiles for `x w^T`: rows of the matrix from `first` on become their columns. The memory
/// of single numbers and of 16 rows is lent.
pub(crate) fn turned_rows<W: RoundedRows>(
    w: &W,
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
            w.rounded(multiplier, first + strip * SIDE + i, summed.clone(), numbers, row);
        }
        for (i, tile) in tiles.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
            multiplier.turn(&rows[i * DEPTH..], depth, tile);
        }
    }
}

/// Fills strips of right tiles for `x w`: columns of the matrix from `first` on, two rows at a time. The memory
/// of single numbers and of two rows is lent.
pub(crate) fn paired_rows<W: RoundedRows>(
    w: &W,
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
        // A few lines of each row are read, which no processor foresees.
        w.ask_for(row + ROWS_AHEAD, first..first + width);
        w.ask_for(row + ROWS_AHEAD + 1, first..first + width);
        w.rounded(multiplier, row, first..first + width, numbers, even);
        w.rounded(multiplier, row + 1, first..first + width, numbers, odd);
        let sixteens = even.as_chunks().0.iter().zip(odd.as_chunks().0);
        for ((even, odd), strip) in sixteens.zip(right.chunks_exact_mut(SIDE * depth)) {
            if let Some(pairs) = strip[at..].first_chunk_mut() {
                multiplier.pair(even, odd, pairs);
            }
        }
    }
}
