//! `vdpbf16ps`, and the packing of tiles that both units share.

use std::arch::x86_64::{
    __m512bh, __m512i, _mm256_loadu_si256, _mm512_cvtepu16_epi32, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps,
    _mm512_loadu_ps, _mm512_loadu_si512, _mm512_or_si512, _mm512_set1_epi32, _mm512_setzero_ps,
    _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_slli_epi32, _mm512_storeu_ps, _mm512_storeu_si512,
    _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};
use std::mem::transmute;

use super::{BLOCK, DEPTH, SIDE, Strips, Sums, TILE};

/// Rows at a time: 8 rows of two registers leave room for their factors in 32 registers.
const ROWS: usize = 8;

#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn round<'a>(blocks: impl Iterator<Item = (&'a [f32; DEPTH], &'a mut [u16; DEPTH])>) {
    for (numbers, out) in blocks {
        // SAFETY: two registers of 16 numbers are read, one of 32 is written.
        unsafe {
            let low = _mm512_loadu_ps(numbers.as_ptr());
            let high = _mm512_loadu_ps(numbers.as_ptr().add(SIDE));
            let halves: __m512i = transmute(_mm512_cvtne2ps_pbh(high, low));
            _mm512_storeu_si512(out.as_mut_ptr().cast(), halves);
        }
    }
}

#[target_feature(enable = "avx512f")]
pub(super) fn pair<'a>(
    rows: impl Iterator<Item = ((&'a [u16; SIDE], &'a [u16; SIDE]), &'a mut [u16; DEPTH])>,
) {
    for ((even, odd), pairs) in rows {
        // SAFETY: two registers of 16 numbers are read, one of 32 is written.
        unsafe {
            let low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(even.as_ptr().cast()));
            let high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(odd.as_ptr().cast()));
            let both = _mm512_or_si512(low, _mm512_slli_epi32::<16>(high));
            _mm512_storeu_si512(pairs.as_mut_ptr().cast(), both);
        }
    }
}

/// Transposes 16 x 16 pairs a tile: four registers at a time within their quarters, then the quarters.
///
/// # Safety
/// avx512f is there, and at each of the rows 32 numbers can be read for every tile.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn turn(rows: &[*const u16; SIDE], tiles: &mut [[u16; TILE]]) {
    for (tile, depth) in tiles.iter_mut().zip((0..).step_by(DEPTH)) {
        // SAFETY: by the contract above; the 16 stores fill the tile.
        unsafe {
            // In quarter q of `quarters[4 * i + k]`: pair 4 * q + k of rows 4 * i to 4 * i + 3.
            let mut quarters = [_mm512_setzero_si512(); SIDE];
            for i in 0..4 {
                let pairs = |row: usize| _mm512_loadu_si512(rows[4 * i + row].add(depth).cast());
                let [a, b, c, d] = [pairs(0), pairs(1), pairs(2), pairs(3)];
                let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
                quarters[4 * i] = _mm512_unpacklo_epi64(ab, cd);
                quarters[4 * i + 1] = _mm512_unpackhi_epi64(ab, cd);
                let (ab, cd) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
                quarters[4 * i + 2] = _mm512_unpacklo_epi64(ab, cd);
                quarters[4 * i + 3] = _mm512_unpackhi_epi64(ab, cd);
            }
            let mut store = |pair: usize, pairs: __m512i| {
                _mm512_storeu_si512(tile.as_mut_ptr().add(pair * DEPTH).cast(), pairs);
            };
            for k in 0..4 {
                let [a, b, c, d] = [quarters[k], quarters[4 + k], quarters[8 + k], quarters[12 + k]];
                let even = [_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0x88>(c, d)];
                let odd = [_mm512_shuffle_i32x4::<0xdd>(a, b), _mm512_shuffle_i32x4::<0xdd>(c, d)];
                store(k, _mm512_shuffle_i32x4::<0x88>(even[0], even[1]));
                store(4 + k, _mm512_shuffle_i32x4::<0x88>(odd[0], odd[1]));
                store(8 + k, _mm512_shuffle_i32x4::<0xdd>(even[0], even[1]));
                store(12 + k, _mm512_shuffle_i32x4::<0xdd>(odd[0], odd[1]));
            }
        }
    }
}

/// # Safety
/// avx512f and avx512bf16 are there, all strips hold `tiles` tiles, and of `before` and `sums` what
/// [`super::Multiplier::multiply_to`] says.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn multiply(strips: Strips<'_>, tiles: usize, before: Option<Sums>, sums: Sums) {
    let [b0, b1] = strips.right.map(<[u16]>::as_ptr);
    for top in (0..BLOCK).step_by(ROWS) {
        let a = strips.left[top / SIDE].as_ptr();
        // SAFETY: by the contract above; offsets stay within the strips and the 32 x 32 sums.
        unsafe {
            let a = a.add(top % SIDE * DEPTH);
            let mut low = [_mm512_setzero_ps(); ROWS];
            let mut high = low;
            if let Some(Sums { start, stride }) = before {
                let c = start.add(top * stride);
                low = std::array::from_fn(|r| _mm512_loadu_ps(c.add(r * stride)));
                high = std::array::from_fn(|r| _mm512_loadu_ps(c.add(r * stride + SIDE)));
            }
            for tile in 0..tiles {
                for pair in 0..SIDE {
                    let at = tile * TILE + pair * DEPTH;
                    let right0: __m512bh = transmute(_mm512_loadu_si512(b0.add(at).cast()));
                    let right1: __m512bh = transmute(_mm512_loadu_si512(b1.add(at).cast()));
                    for r in 0..ROWS {
                        #[allow(clippy::cast_ptr_alignment)] // it is read unaligned
                        let factor = a.add(tile * TILE + r * DEPTH + pair * 2).cast::<i32>();
                        let left: __m512bh = transmute(_mm512_set1_epi32(factor.read_unaligned()));
                        low[r] = _mm512_dpbf16_ps(low[r], left, right0);
                        high[r] = _mm512_dpbf16_ps(high[r], left, right1);
                    }
                }
            }
            let c = sums.start.add(top * sums.stride);
            for r in 0..ROWS {
                _mm512_storeu_ps(c.add(r * sums.stride), low[r]);
                _mm512_storeu_ps(c.add(r * sums.stride + SIDE), high[r]);
            }
        }
    }
}
