//! From rows of numbers to the tiles of both sides of a product.

use std::ops::Range;

use super::tiles::{DEPTH, Multiplier, SIDE, TILE};

/// How far ahead of what is packed rows are asked for.
const ROWS_AHEAD: usize = 16;

/// The rows of a matrix, which can be had in bf16.
pub(crate) trait RoundedRows {
    /// `[rows, cols]`.
    fn shape(&self) -> [usize; 2];

    /// Numbers `cols` of `row`, which are there, where they lie in memory as they are asked for.
    fn kept(&self, _row: usize, _cols: Range<usize>) -> Option<&[u16]> {
        None
    }

    /// The same numbers, wherever they come from. `numbers` is memory for as many floats.
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

    /// Numbers `cols` of `row`, where they are kept or in `out`, with zeros behind the row's end and the last row.
    fn rounded<'a>(
        &'a self,
        multiplier: &Multiplier,
        row: usize,
        cols: Range<usize>,
        numbers: &mut [f32],
        out: &'a mut [u16],
    ) -> &'a [u16] {
        let [rows, width] = self.shape();
        let end = if row < rows { cols.end.min(width) } else { cols.start };
        if end == cols.end
            && let Some(kept) = self.kept(row, cols.clone())
        {
            return kept;
        }
        let (here, beyond) = out.split_at_mut(end - cols.start);
        beyond.fill(0);
        if !here.is_empty() {
            self.round_row(multiplier, row, cols.start..end, numbers, here);
        }
        out
    }
}

/// Fills a strip of left tiles with rows, 16 at most; behind the last, and behind a row's end, there are zeros.
pub(crate) fn left_strip<'a>(
    multiplier: &Multiplier,
    mut rows: impl Iterator<Item = &'a [f32]>,
    tiles: &mut [u16],
) {
    for i in 0..SIDE {
        multiplier.left_row(rows.next().unwrap_or_default(), tiles, i);
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
    for (strip, tiles) in right.chunks_exact_mut(SIDE * depth).enumerate() {
        let mut memory = rows.chunks_exact_mut(depth);
        let rows = std::array::from_fn(|i| {
            let row = first + strip * SIDE + i;
            w.rounded(multiplier, row, summed.clone(), numbers, memory.next().unwrap_or_default())
        });
        multiplier.turn(&rows, tiles);
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
        let row = summed.start + 2 * pair;
        // A few lines of each row are read, which no processor foresees.
        w.ask_for(row + ROWS_AHEAD, first..first + width);
        w.ask_for(row + ROWS_AHEAD + 1, first..first + width);
        let even = w.rounded(multiplier, row, first..first + width, numbers, even);
        let odd = w.rounded(multiplier, row + 1, first..first + width, numbers, odd);
        let at = pair / SIDE * TILE + pair % SIDE * DEPTH;
        multiplier.pair(even, odd, &mut right[at..], SIDE * depth);
    }
}
