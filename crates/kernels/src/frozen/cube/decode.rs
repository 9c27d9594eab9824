//! The kernel that spells a frozen matrix out in the type that products are computed in.
//!
//! A format is told by two functions of a number's place: the code that stands there, and the factor
//! and offset that it shares with its neighbours. The number is `code * factor + offset`. Everything
//! is read out of 32-bit words, which every graphics card can address.

// What `cube` makes of a function is documented by the function.
#![allow(missing_docs)]
// CubeCL reads these functions as text: it wants `x = x + y`, plain numbers and values as they are.
#![allow(clippy::pedantic)]

use burn_cubecl::cubecl;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::super::Format;
use super::super::format::{NESTED_BLOCK, NF4_BLOCK};

/// Words in front of an NF4 matrix' codes: what the codes stand for, what the codes of quantized
/// scales stand for, and what these are counted from.
pub const NF4_TABLE: usize = CODEBOOK + MAP + 1;
const CODEBOOK: usize = 16;
const MAP: usize = 256;

/// bitsandbytes' 1 / 127.
const ONE_127TH: f32 = 7.874_016e-3;
const TWO_TO_MINUS_24: f32 = 5.960_464_5e-8;

/// Where the parts of a matrix lie, in words, and what is wanted of it.
#[derive(CubeLaunch, CubeType)]
pub struct Place {
    /// Vectors of the output.
    vectors: usize,
    /// Columns of the matrix.
    cols: usize,
    /// The row that the output begins with, where none are named.
    first_row: usize,
    /// Where the scales begin.
    scales: usize,
    /// Where the scales of the scales begin.
    nested: usize,
}

/// What the kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kept {
    pub format: Format,
    /// Whether the scales are quantized themselves.
    pub nested: bool,
    /// Rows of a head, where those of its two halves alternate; otherwise 0.
    pub interleaved: usize,
}

/// Writes rows of a matrix, from one on or those that `ids` names, a vector of columns a unit.
#[cube(launch_unchecked, address_type = "dynamic")]
pub fn spell_out<F: Float, I: Int, N: Size>(
    words: &[u32],
    ids: ComptimeOption<&[I]>,
    out: &mut [Vector<F, N>],
    place: &Place,
    #[comptime] kept: Kept,
    #[define(F, I)] _types: [ElemType; 2],
) {
    if ABSOLUTE_POS >= place.vectors {
        terminate!();
    }
    let mut numbers = Vector::<F, N>::empty();
    let lanes = numbers.vector_size();
    let at = ABSOLUTE_POS * lanes;
    let col = at % place.cols;
    let row = #[comptime]
    match ids {
        ComptimeOption::Some(ids) => usize::cast_from(ids[at / place.cols]),
        ComptimeOption::None => place.first_row + at / place.cols,
    };
    let first = row_in_memory(row, kept.interleaved) * place.cols + col;
    let (factor, offset) = scale(words, first, place, kept);
    #[unroll]
    for lane in 0..lanes {
        let number = code(words, first + lane, kept.format) * factor + offset;
        numbers.insert(lane, F::cast_from(number));
    }
    out[ABSOLUTE_POS] = numbers;
}

/// Row `i + half * head_dim / 2` of a head lies at `2 * i + half` of it.
#[cube]
fn row_in_memory(row: usize, #[comptime] head_dim: usize) -> usize {
    if comptime![head_dim == 0] {
        row
    } else {
        let half_dim = comptime![head_dim / 2];
        let within = row % head_dim;
        row - within + 2 * (within % half_dim) + within / half_dim
    }
}

/// Factor and offset of the numbers from `number` on, which never leave a block together.
#[cube]
fn scale(words: &[u32], number: usize, place: &Place, #[comptime] kept: Kept) -> (f32, f32) {
    match comptime![kept.format] {
        Format::F32 | Format::F16 | Format::Bf16 => (1.0f32.runtime(), 0.0f32.runtime()),
        Format::Int8 => (float(words[place.scales + number / place.cols]) * ONE_127TH, 0.0f32.runtime()),
        Format::Nf4 => (nf4_scale(words, number / NF4_BLOCK, place, kept.nested), 0.0f32.runtime()),
        Format::Q4_0 | Format::Q4_1 | Format::Q5_0 | Format::Q5_1 | Format::Q8_0 => {
            small_scale(words, number / 32, kept.format)
        }
        Format::Q4K | Format::Q5K => part_scale(words, number, kept.format),
        Format::Q6K => {
            let block = number / 256 * 210;
            let part = signed(byte(words, block + 192 + number % 256 / 16));
            (half(words, block + 208) * part, 0.0f32.runtime())
        }
    }
}

/// What stands at `number`, before factor and offset.
#[cube]
fn code(words: &[u32], number: usize, #[comptime] format: Format) -> f32 {
    match comptime![format] {
        Format::F32 => float(words[number]),
        Format::F16 => half(words, 2 * number),
        Format::Bf16 => float(two_bytes(words, 2 * number) << 16),
        Format::Int8 => signed(byte(words, number)),
        Format::Nf4 => {
            let pair = byte(words, 4 * NF4_TABLE + number / 2);
            float(words[usize::cast_from((pair >> (4 * (1 - u32::cast_from(number % 2)))) & 15)])
        }
        Format::Q8_0 => signed(byte(words, number / 32 * 34 + 2 + number % 32)),
        Format::Q4_0 | Format::Q4_1 | Format::Q5_0 | Format::Q5_1 => small_code(words, number, format),
        Format::Q4K | Format::Q5K => part_code(words, number, format),
        Format::Q6K => six_bits(words, number),
    }
}

#[cube]
fn nf4_scale(words: &[u32], block: usize, place: &Place, #[comptime] nested: bool) -> f32 {
    if comptime![nested] {
        let code = usize::cast_from(byte(words, 4 * place.scales + block));
        let scale = float(words[place.nested + block / NESTED_BLOCK]);
        float(words[CODEBOOK + code]) * scale + float(words[CODEBOOK + MAP])
    } else {
        float(words[place.scales + block])
    }
}

/// Of llama.cpp's blocks of 32: a factor, and where the format has one a minimum.
#[cube]
fn small_scale(words: &[u32], block: usize, #[comptime] format: Format) -> (f32, f32) {
    let size = comptime![format.block().1];
    let factor = half(words, block * size);
    if comptime![has_minimum(format)] {
        (factor, half(words, block * size + 2))
    } else {
        (factor, 0.0f32.runtime())
    }
}

/// Byte `j` of a block's codes holds number `j` in its lower four bits and number `j + 16` in its
/// upper ones; fifth bits stand in front of the codes, bit `j` is number `j`'s.
#[cube]
fn small_code(words: &[u32], number: usize, #[comptime] format: Format) -> f32 {
    let (size, five_bits) = comptime![(format.block().1, has_fifths(format))];
    let fifths = comptime![if has_minimum(format) { 4 } else { 2 }];
    let codes = comptime![if five_bits { fifths + 4 } else { fifths }];
    let (block, j) = (number / 32 * size, number % 32);
    let mut code = nibble(byte(words, block + codes + j % 16), j / 16);
    if comptime![five_bits] {
        let eight = byte(words, block + fifths + j / 8);
        code |= ((eight >> u32::cast_from(j % 8)) & 1) << 4;
    }
    let zero = comptime![match (has_minimum(format), five_bits) {
        (true, _) => 0.0f32,
        (false, false) => 8.0,
        (false, true) => 16.0,
    }];
    f32::cast_from(code) - zero
}

fn has_minimum(format: Format) -> bool {
    matches!(format, Format::Q4_1 | Format::Q5_1)
}

fn has_fifths(format: Format) -> bool {
    matches!(format, Format::Q5_0 | Format::Q5_1 | Format::Q5K)
}

/// Of `Q4_K` and `Q5_K`: twelve bytes hold scale and minimum of eight parts, six bits each. Bytes 0
/// to 3 are the scales of parts 0 to 3 and 4 to 7 their minima; above them lie the upper two bits of
/// parts 4 to 7, whose lower four bits are in bytes 8 to 11, the scale's below.
#[cube]
fn part_scale(words: &[u32], number: usize, #[comptime] format: Format) -> (f32, f32) {
    let size = comptime![format.block().1];
    let (block, part) = (number / 256 * size, number % 256 / 32);
    let (first, quarter) = (byte(words, block + 4 + part % 4), part % 4);
    let second = byte(words, block + 8 + quarter);
    let third = byte(words, block + 12 + quarter);
    let scale = select(part < 4, first & 63, (third & 15) | ((first >> 6) << 4));
    let minimum = select(part < 4, second & 63, (third >> 4) | ((second >> 6) << 4));
    let (factor, offset) = (half(words, block), half(words, block + 2));
    (factor * f32::cast_from(scale), 0.0 - offset * f32::cast_from(minimum))
}

/// 32 bytes hold one part of 32 in their lower bits and the next in their upper ones; the fifth bit of
/// number `j` of part `p` is bit `p` of byte `j` of the 32 in front of the codes.
#[cube]
fn part_code(words: &[u32], number: usize, #[comptime] format: Format) -> f32 {
    let size = comptime![format.block().1];
    let codes = comptime![if has_fifths(format) { 48 } else { 16 }];
    let block = number / 256 * size;
    let (part, j) = (number % 256 / 32, number % 32);
    let mut code = nibble(byte(words, block + codes + part / 2 * 32 + j), part % 2);
    if comptime![has_fifths(format)] {
        code |= ((byte(words, block + 16 + j) >> u32::cast_from(part)) & 1) << 4;
    }
    f32::cast_from(code)
}

/// Of `Q6_K`: a block falls into two halves of 128, of which 64 bytes hold the lower four bits,
/// numbers 64 to 127 above 0 to 63, and 32 bytes the upper two, four numbers a byte, 32 apart.
#[cube]
fn six_bits(words: &[u32], number: usize) -> f32 {
    let block = number / 256 * 210;
    let (half, quarter, j) = (number % 256 / 128, number % 128 / 32, number % 32);
    let lower = nibble(byte(words, block + half * 64 + quarter % 2 * 32 + j), quarter / 2);
    let upper = (byte(words, block + 128 + half * 32 + j) >> (2 * u32::cast_from(quarter))) & 3;
    f32::cast_from(lower | (upper << 4)) - 32.0
}

#[cube]
fn byte(words: &[u32], at: usize) -> u32 {
    (words[at / 4] >> (8 * u32::cast_from(at % 4))) & 255
}

/// Two bytes from an even place on.
#[cube]
fn two_bytes(words: &[u32], at: usize) -> u32 {
    (words[at / 4] >> (8 * u32::cast_from(at % 4))) & 65_535
}

/// The lower four bits of a byte, or the upper ones.
#[cube]
fn nibble(byte: u32, upper: usize) -> u32 {
    (byte >> (4 * u32::cast_from(upper))) & 15
}

#[cube]
fn signed(byte: u32) -> f32 {
    f32::cast_from(byte) - f32::cast_from((byte >> 7) << 8)
}

#[cube]
fn float(bits: u32) -> f32 {
    f32::reinterpret(bits)
}

/// The float16 at an even place. Not every card has the type, so its bits are moved to where a float32
/// has them; subnormal ones are counted instead.
#[cube]
fn half(words: &[u32], at: usize) -> f32 {
    let bits = two_bytes(words, at);
    let (sign, magnitude) = (bits & 32_768, bits & 32_767);
    // Exponents count from 15 and 127; the largest is an infinity's or a NaN's.
    let exponents = select(magnitude < 31_744, 112u32, 224u32);
    let normal = (magnitude << 13) + (exponents << 23);
    let subnormal = u32::reinterpret(f32::cast_from(magnitude) * TWO_TO_MINUS_24);
    float((sign << 16) | select(magnitude < 1024, subnormal, normal))
}
