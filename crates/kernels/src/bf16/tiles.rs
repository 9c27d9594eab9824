//! Products of small bf16 tiles with float32 sums, on processors that have an instruction for it.
//!
//! Both instruction sets want the same thing, so both share one layout. A *tile* is 1 KiB: on the
//! left 16 rows of 32 numbers, on the right 16 rows of 16 pairs, the pairs being two neighbours
//! along the summed dimension. [`Multiplier::multiply_block`] sums the products of two strips of left tiles
//! with two strips of right tiles into 32 x 32 numbers.

#![allow(unsafe_code)] // instructions that compilers do not choose by themselves

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx512;

use std::sync::OnceLock;

/// Rows of a left tile, columns of a right one.
pub(crate) const SIDE: usize = 16;
/// Numbers that a tile sums over.
pub(crate) const DEPTH: usize = 32;
/// Numbers in a tile.
pub(crate) const TILE: usize = SIDE * DEPTH;
/// Rows and columns of what [`Multiplier::multiply_block`] computes.
pub(crate) const BLOCK: usize = 2 * SIDE;

/// What multiplies bf16 on this processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bf16Unit {
    /// Intel's tile unit, from Sapphire Rapids on.
    Amx,
    /// `vdpbf16ps`: Cooper Lake and Sapphire Rapids, AMD from Zen 4 on.
    Avx512,
}

impl Bf16Unit {
    /// The best unit there is, if any. Asked of the processor once.
    pub(crate) fn detect() -> Option<Self> {
        static FOUND: OnceLock<Option<Bf16Unit>> = OnceLock::new();
        *FOUND.get_or_init(detect)
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Option<Bf16Unit> {
    None
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Option<Bf16Unit> {
    let avx512 = is_x86_feature_detected!("avx512bf16")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl");
    if !avx512 {
        return None;
    }
    Some(if amx::available() { Bf16Unit::Amx } else { Bf16Unit::Avx512 })
}

/// Strips of tiles that lie one behind another, for one [`Multiplier::multiply_block`].
#[derive(Clone, Copy)]
pub(crate) struct Strips<'a> {
    /// Rows 0 to 15 and 16 to 31 of the left side.
    pub left: [&'a [u16]; 2],
    /// Columns 0 to 15 and 16 to 31 of the right side.
    pub right: [&'a [u16]; 2],
}

/// 32 x 32 numbers, in rows that lie `stride` numbers apart.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sums {
    pub start: *mut f32,
    pub stride: usize,
}

/// A thread's right to multiply: the tile unit has to be set up for each thread.
pub(crate) struct Multiplier {
    unit: Bf16Unit,
}

impl Multiplier {
    pub(crate) fn new(unit: Bf16Unit) -> Self {
        #[cfg(target_arch = "x86_64")]
        if unit == Bf16Unit::Amx {
            amx::configure();
        }
        Self { unit }
    }

    /// The nearest bf16 of each of `numbers`, halves to even.
    ///
    /// # Panics
    /// Where there are not as many of both.
    #[allow(clippy::unused_self)] // a multiplier is the proof that the instruction is there
    pub(crate) fn round(&self, numbers: &[f32], out: &mut [u16]) {
        assert_eq!(numbers.len(), out.len(), "a number for every number");
        let (blocks, rest) = numbers.as_chunks();
        let (out_blocks, out_rest) = out.as_chunks_mut();
        #[cfg(target_arch = "x86_64")]
        // SAFETY: whichever unit was detected, avx512bf16 was.
        unsafe {
            avx512::round(blocks.iter().zip(out_blocks));
        }
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("no unit is ever detected here: {blocks:?} {out_blocks:?}");
        rest.iter().zip(out_rest).for_each(|(&x, out)| *out = round(x));
    }

    /// Row `row` of a strip of left tiles: the nearest bf16 of each of `numbers`, and zeros behind them.
    ///
    /// # Panics
    /// Where there are more numbers than the tiles have in a row, or fewer rows.
    #[allow(clippy::unused_self)] // as above
    pub(crate) fn left_row(&self, numbers: &[f32], tiles: &mut [u16], row: usize) {
        let (blocks, rest) = numbers.as_chunks();
        assert!(row < SIDE && tiles.len() / TILE >= numbers.len().div_ceil(DEPTH), "a row of the tiles");
        let mut places =
            tiles.as_chunks_mut::<TILE>().0.iter_mut().map(|tile| &mut tile.as_chunks_mut().0[row]);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        unsafe {
            avx512::round(blocks.iter().zip(places.by_ref()));
        }
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("no unit is ever detected here: {blocks:?}");
        if !rest.is_empty()
            && let Some(place) = places.next()
        {
            *place = [0; DEPTH];
            rest.iter().zip(place).for_each(|(&x, out)| *out = round(x));
        }
        places.for_each(|place| *place = [0; DEPTH]);
    }

    /// A strip of right tiles from 16 rows, which become its columns.
    ///
    /// # Panics
    /// Where a row ends before the tiles do.
    #[allow(clippy::unused_self)] // as above
    pub(crate) fn turn(&self, rows: &[&[u16]; SIDE], tiles: &mut [u16]) {
        let tiles = tiles.as_chunks_mut::<TILE>().0;
        assert!(rows.iter().all(|row| row.len() >= tiles.len() * DEPTH), "rows as long as the tiles");
        #[cfg(target_arch = "x86_64")]
        // SAFETY: whichever unit was detected, avx512f was; the numbers are there by the assertion.
        unsafe {
            avx512::turn(&rows.map(<[u16]>::as_ptr), tiles);
        }
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("no unit is ever detected here: {tiles:?}");
    }

    /// A row of a tile in each of some strips of right tiles, which begin `stride` numbers apart: numbers of one row of a
    /// matrix, each with the one below it.
    ///
    /// # Panics
    /// Where these are not two rows of whole tiles, or the strips end before.
    #[allow(clippy::unused_self)] // as above
    pub(crate) fn pair(&self, even: &[u16], odd: &[u16], strips: &mut [u16], stride: usize) {
        let ((even, rest), (odd, _)) = (even.as_chunks::<SIDE>(), odd.as_chunks::<SIDE>());
        assert!(even.len() == odd.len() && rest.is_empty(), "as many whole tiles above as below");
        assert!(strips.len().div_ceil(stride) >= even.len(), "a strip for each");
        let places = strips.chunks_mut(stride).filter_map(|strip| strip.first_chunk_mut());
        #[cfg(target_arch = "x86_64")]
        // SAFETY: whichever unit was detected, avx512f was.
        unsafe {
            avx512::pair(even.iter().zip(odd).zip(places));
        }
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("no unit is ever detected here: {even:?} {odd:?}");
    }

    /// `sums = left * right`, added to what is there unless `fresh`, where `sums` is 32 x 32 in rows
    /// that lie `stride` numbers apart.
    ///
    /// # Panics
    /// Where the strips differ in length or `sums` is too short.
    pub(crate) fn multiply_block(&self, strips: Strips<'_>, fresh: bool, sums: &mut [f32], stride: usize) {
        assert!(stride >= BLOCK && sums.len() >= (BLOCK - 1) * stride + BLOCK, "room for 32 x 32 sums");
        let sums = Sums { start: sums.as_mut_ptr(), stride };
        // SAFETY: both lie within the slice by the assertion, or are one.
        unsafe { self.multiply_to(strips, (!fresh).then_some(sums), sums) };
    }

    /// `sums = before + left * right`, or without `before` the product alone.
    ///
    /// # Safety
    /// `before` can be read and `sums` can be written, by this thread alone; they are one or do not overlap.
    ///
    /// # Panics
    /// Where the strips differ in length.
    pub(crate) unsafe fn multiply_to(&self, strips: Strips<'_>, before: Option<Sums>, sums: Sums) {
        let numbers = strips.left[0].len();
        let equal = strips.left.iter().chain(&strips.right).all(|s| s.len() == numbers);
        assert!(equal && numbers.is_multiple_of(TILE), "strips of one length, in whole tiles");
        let tiles = numbers / TILE;
        assert!(tiles > 0, "something to sum over");
        #[cfg(target_arch = "x86_64")]
        match self.unit {
            // SAFETY: the unit was detected, the thread configured, the lengths are checked above, and the rest is asked
            // of the caller.
            Bf16Unit::Amx => unsafe { amx::multiply(strips, tiles, before, sums) },
            // SAFETY: as above.
            Bf16Unit::Avx512 => unsafe { avx512::multiply(strips, tiles, before, sums) },
        }
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("no unit is ever detected here: {:?}, {tiles}, {before:?} {sums:?}", self.unit);
    }
}

/// The nearest bf16, halves to even. NaN stays NaN.
#[inline]
pub(crate) fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() { 0x7fc0 } else { (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16 }
}

impl Drop for Multiplier {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        if self.unit == Bf16Unit::Amx {
            amx::release();
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
#[allow(clippy::float_cmp)] // small whole numbers, exact in every format
mod tests {
    use super::*;

    /// Small whole numbers, whose products and sums are exact in every format.
    #[test]
    fn both_units_sum_the_products_of_their_tiles() {
        let units = match Bf16Unit::detect() {
            None => Vec::new(),
            Some(Bf16Unit::Avx512) => vec![Bf16Unit::Avx512],
            Some(Bf16Unit::Amx) => vec![Bf16Unit::Amx, Bf16Unit::Avx512],
        };
        let number = |i: usize| ((i * 7 + i / 5) % 9) as f32 - 4.0;
        let tiles = 3;
        let strip = |seed: usize| -> Vec<u16> {
            (0..tiles * TILE).map(|i| (number(i + seed).to_bits() >> 16) as u16).collect()
        };
        let (left, right) = ([strip(0), strip(1)], [strip(2), strip(3)]);
        let value = |half: u16| f32::from_bits(u32::from(half) << 16);
        let expected = |i: usize, j: usize| -> f32 {
            let (a, b) = (&left[i / SIDE], &right[j / SIDE]);
            let at = |k: usize| {
                let (tile, k) = (k / DEPTH * TILE, k % DEPTH);
                let a = value(a[tile + i % SIDE * DEPTH + k]);
                a * value(b[tile + k / 2 * DEPTH + j % SIDE * 2 + k % 2])
            };
            (0..tiles * DEPTH).map(at).sum()
        };
        let strips = Strips { left: [&left[0], &left[1]], right: [&right[0], &right[1]] };
        for unit in units {
            let multiplier = Multiplier::new(unit);
            let stride = BLOCK + 3;
            let mut sums = vec![1.0; BLOCK * stride];
            for (fresh, before) in [(false, 1.0), (true, 0.0)] {
                multiplier.multiply_block(strips, fresh, &mut sums, stride);
                for (i, j) in (0..BLOCK).flat_map(|i| (0..BLOCK).map(move |j| (i, j))) {
                    assert_eq!(sums[i * stride + j], expected(i, j) + before, "{unit:?} at {i}, {j}");
                }
            }
        }
    }

    #[test]
    fn right_tiles_hold_rows_turned_and_rows_paired() {
        let Some(unit) = Bf16Unit::detect() else { return };
        let multiplier = Multiplier::new(unit);
        let stride = 2 * DEPTH + 7;
        let memory: Vec<u16> = (0..(SIDE * stride) as u16).collect();
        let rows = std::array::from_fn(|i| &memory[i * stride..][..stride]);
        let mut tiles = [0; 2 * TILE];
        multiplier.turn(&rows, &mut tiles);
        for (row, k) in (0..SIDE).flat_map(|row| (0..2 * DEPTH).map(move |k| (row, k))) {
            let found = tiles[k / DEPTH * TILE + k % DEPTH / 2 * DEPTH + row * 2 + k % 2];
            assert_eq!(found, rows[row][k], "{row}, {k}");
        }
        let even: [_; 2 * SIDE] = std::array::from_fn(|i| i as u16);
        let odd = even.map(|i| 60_000 + i);
        let mut strips = [0; 3 * TILE];
        multiplier.pair(&even, &odd, &mut strips, TILE + 3);
        for (i, (even, odd)) in even.into_iter().zip(odd).enumerate() {
            assert_eq!(strips[i / SIDE * (TILE + 3) + i % SIDE * 2..][..2], [even, odd], "{i}");
        }
        assert_eq!(strips[2 * SIDE..][..SIDE], [0; SIDE]);
    }

    #[test]
    fn left_tiles_hold_rows_and_zeros_behind_them() {
        let Some(unit) = Bf16Unit::detect() else { return };
        let numbers: Vec<f32> = (1..40_u8).map(f32::from).collect();
        let mut tiles = [1; 3 * TILE];
        Multiplier::new(unit).left_row(&numbers, &mut tiles, 5);
        for (tile, k) in (0..3).flat_map(|tile| (0..DEPTH).map(move |k| (tile, k))) {
            let expected = numbers.get(tile * DEPTH + k).map_or(0, |x| (x.to_bits() >> 16) as u16);
            assert_eq!(tiles[tile * TILE + 5 * DEPTH + k], expected, "{tile}, {k}");
        }
        let others = tiles.iter().filter(|&&x| x == 1).count();
        assert_eq!(others, 3 * (TILE - DEPTH), "other rows stay as they are");
    }

    #[test]
    fn rounding_is_to_nearest_and_to_even() {
        let Some(unit) = Bf16Unit::detect() else { return };
        let numbers: Vec<f32> = (0..67).map(|i| 1.0 + i as f32 / 1024.0).chain([f32::NAN, -0.0]).collect();
        let mut rounded = vec![0; numbers.len()];
        Multiplier::new(unit).round(&numbers, &mut rounded);
        for (x, y) in numbers.iter().zip(rounded) {
            assert_eq!(half::bf16::from_f32(*x).is_nan(), x.is_nan());
            assert!(x.is_nan() || half::bf16::from_f32(*x).to_bits() == y, "{x}");
        }
    }
}
