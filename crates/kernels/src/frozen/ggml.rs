//! llama.cpp's blocks, read only. The layouts are those of the structs in its `ggml-common.h`, the
//! values those of its reference loops: whatever a block multiplies first is multiplied first here.
//!
//! Every loop runs over arrays of a fixed length, so that the compiler turns it into vectors.

use super::dense::f16;
use super::{Format, wide::widest};

/// The numbers of `blocks`, whole blocks of `format`, as float32.
///
/// # Panics
/// If the format is none of llama.cpp's, which the matrix has checked.
pub fn dequantize(format: Format, blocks: &[u8], out: &mut [f32]) {
    match format {
        Format::Q4_0 => widest!(|| each(blocks, out, q4_0)),
        Format::Q4_1 => widest!(|| each(blocks, out, q4_1)),
        Format::Q5_0 => widest!(|| each(blocks, out, q5_0)),
        Format::Q5_1 => widest!(|| each(blocks, out, q5_1)),
        Format::Q8_0 => widest!(|| each(blocks, out, q8_0)),
        Format::Q4K => widest!(|| each(blocks, out, q4_k)),
        Format::Q5K => widest!(|| each(blocks, out, q5_k)),
        Format::Q6K => widest!(|| each(blocks, out, q6_k)),
        _ => unreachable!("{format} is not a format of llama.cpp"),
    }
}

/// Blocks of `B` bytes to `N` numbers each.
#[inline(always)]
fn each<const B: usize, const N: usize>(
    blocks: &[u8],
    out: &mut [f32],
    block: impl Fn(&[u8; B], &mut [f32; N]),
) {
    for (y, bytes) in out.as_chunks_mut().0.iter_mut().zip(blocks.as_chunks().0) {
        block(bytes, y);
    }
}

/// The `N` bytes of a block from `at` on.
#[inline(always)]
fn part<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    // Both are constants where this is called, and lie within the block.
    block[at..].first_chunk().unwrap_or(&[0; N])
}

/// Codes and numbers of a block of 32 lie as two halves: byte `j` holds number `j` in its lower
/// four bits and number `j + 16` in its upper ones.
#[inline(always)]
fn halves(codes: &[u8; 16], out: &mut [f32; 32], number: impl Fn(u8, usize) -> f32) {
    let (low, high) = out.split_at_mut(16);
    for (j, ((low, high), code)) in low.iter_mut().zip(high).zip(codes).enumerate() {
        *low = number(code & 15, j);
        *high = number(code >> 4, j + 16);
    }
}

/// `scale` f16, codes `[16]`: `scale * (code - 8)`.
#[inline(always)]
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let scale = f16(*part(block, 0));
    halves(part(block, 2), out, |code, _| (f32::from(code) - 8.0) * scale);
}

/// `scale` f16, `minimum` f16, codes `[16]`: `scale * code + minimum`.
#[inline(always)]
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (scale, minimum) = (f16(*part(block, 0)), f16(*part(block, 2)));
    halves(part(block, 4), out, |code, _| f32::from(code) * scale + minimum);
}

/// `scale` f16, fifth bits u32 (bit `j` is number `j`'s), codes `[16]`: `scale * (code - 16)`.
#[inline(always)]
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let (scale, fifths) = (f16(*part(block, 0)), u32::from_le_bytes(*part(block, 2)));
    halves(part(block, 6), out, |code, j| (f32::from(code | fifth(fifths, j)) - 16.0) * scale);
}

/// `scale` f16, `minimum` f16, fifth bits u32, codes `[16]`: `scale * code + minimum`.
#[inline(always)]
fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (scale, minimum) = (f16(*part(block, 0)), f16(*part(block, 2)));
    let fifths = u32::from_le_bytes(*part(block, 4));
    halves(part(block, 8), out, |code, j| f32::from(code | fifth(fifths, j)) * scale + minimum);
}

/// Number `j`'s fifth bit, where it belongs in the code.
#[inline(always)]
fn fifth(bits: u32, j: usize) -> u8 {
    ((bits >> j & 1) << 4) as u8
}

/// `scale` f16, codes i8 `[32]`: `scale * code`.
#[inline(always)]
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let scale = f16(*part(block, 0));
    for (y, &code) in out.iter_mut().zip(part::<32>(block, 2)) {
        *y = f32::from(code.cast_signed()) * scale;
    }
}

/// `scale` f16, `minimum` f16, scales and minima of the eight parts `[12]`, codes `[128]`: 32
/// bytes hold one part of 32 in their lower bits and the next in their upper ones.
#[inline(always)]
fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let parts = Parts::new(part(block, 0));
    let codes = part::<128>(block, 16).as_chunks::<32>().0;
    for (i, (codes, out)) in codes.iter().zip(out.as_chunks_mut::<64>().0).enumerate() {
        let ([scale_low, scale_high], [min_low, min_high]) = parts.pair(i);
        let (low, high) = out.split_at_mut(32);
        for ((low, high), code) in low.iter_mut().zip(high).zip(codes) {
            *low = f32::from(code & 15) * scale_low - min_low;
            *high = f32::from(code >> 4) * scale_high - min_high;
        }
    }
}

/// As [`q4_k`], with fifth bits `[32]` before the codes: bit `p` of byte `j` belongs to number `j` of
/// part `p`.
#[inline(always)]
fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let parts = Parts::new(part(block, 0));
    let fifths = part::<32>(block, 16);
    let codes = part::<128>(block, 48).as_chunks::<32>().0;
    for (i, (codes, out)) in codes.iter().zip(out.as_chunks_mut::<64>().0).enumerate() {
        let ([scale_low, scale_high], [min_low, min_high]) = parts.pair(i);
        let (low, high) = out.split_at_mut(32);
        for (((low, high), code), fifth) in low.iter_mut().zip(high).zip(codes).zip(fifths) {
            let fifth = fifth >> (2 * i);
            *low = f32::from(code & 15 | (fifth & 1) << 4) * scale_low - min_low;
            *high = f32::from(code >> 4 | (fifth & 2) << 3) * scale_high - min_high;
        }
    }
}

/// Lower four bits `[128]`, upper two bits `[64]`, scales i8 of the sixteen parts, `scale` f16:
/// `scale * part's * (code - 32)`.
///
/// The block falls into two halves of 128. Of such a half, 64 bytes of lower bits hold numbers 0
/// to 63 below and 64 to 127 above; byte `j` of 32 with upper bits has those of numbers `j`,
/// `j + 32`, `j + 64` and `j + 96`.
#[inline(always)]
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let scale = f16(*part(block, 208));
    let lower = part::<128>(block, 0).as_chunks::<32>().0;
    let upper = part::<64>(block, 128).as_chunks::<32>().0;
    let scales = part::<16>(block, 192).map(|s| scale * f32::from(s.cast_signed()));
    for (i, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (half, quarter) = (i / 4, i % 4);
        let lower = &lower[half * 2 + quarter % 2];
        let (lower_shift, upper_shift) = (quarter / 2 * 4, quarter * 2);
        let scale = |j: usize| scales[i * 2 + j / 16];
        for (j, ((y, lower), upper)) in out.iter_mut().zip(lower).zip(&upper[half]).enumerate() {
            let code = lower >> lower_shift & 15 | (upper >> upper_shift & 3) << 4;
            *y = scale(j) * (f32::from(code) - 32.0);
        }
    }
}

/// Scales and minima of the eight parts of a `Q4_K` or `Q5_K` block.
struct Parts {
    scales: [f32; 8],
    minima: [f32; 8],
}

impl Parts {
    /// From the head of a block: `scale` f16, `minimum` f16, and twelve bytes with sixteen times
    /// six bits. Bytes 0 to 3 hold the scales of parts 0 to 3, bytes 4 to 7 their minima, bytes 8
    /// to 11 the lower four bits of the scales (below) and minima (above) of parts 4 to 7. The
    /// upper two bits of those lie above the scales and the minima of parts 0 to 3.
    #[inline(always)]
    fn new(head: &[u8; 16]) -> Self {
        let word = |at: usize| u32::from_le_bytes(*part(head, at));
        let (first, second, third) = (word(4), word(8), word(12));
        let upper = |word: u32| (word >> 6 & 0x0303_0303) << 4;
        let numbers = |parts0: u32, parts4: u32, factor: f32| {
            let six_bits = u64::from(parts0) | u64::from(parts4) << 32;
            six_bits.to_le_bytes().map(|bits| factor * f32::from(bits))
        };
        let scales4 = third & 0x0f0f_0f0f | upper(first);
        let minima4 = third >> 4 & 0x0f0f_0f0f | upper(second);
        Self {
            scales: numbers(first & 0x3f3f_3f3f, scales4, f16(*part(head, 0))),
            minima: numbers(second & 0x3f3f_3f3f, minima4, f16(*part(head, 2))),
        }
    }

    /// Scales and minima of parts `2 i` and `2 i + 1`.
    #[inline(always)]
    fn pair(&self, i: usize) -> ([f32; 2], [f32; 2]) {
        let two = |x: &[f32; 8]| x.as_chunks().0.get(i).copied().unwrap_or_default();
        (two(&self.scales), two(&self.minima))
    }
}
