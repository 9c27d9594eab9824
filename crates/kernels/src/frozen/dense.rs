//! Numbers that are floats already. Memory that is mapped from a file begins anywhere, so they
//! are put together from their bytes; compiled, that is a plain load.

use super::{Format, wide::widest};

/// The numbers of `bytes`, in `format`, as float32.
///
/// # Panics
/// If the format is none of F32, F16 and Bf16, which the matrix has checked.
pub fn dequantize(format: Format, bytes: &[u8], out: &mut [f32]) {
    match format {
        Format::F32 => widest!(|| each(bytes, out, f32::from_le_bytes)),
        Format::F16 => widest!(|| each(bytes, out, f16)),
        Format::Bf16 => widest!(|| each(bytes, out, bf16)),
        _ => unreachable!("{format} is not a format of plain floats"),
    }
}

#[inline(always)]
fn each<const N: usize>(bytes: &[u8], out: &mut [f32], number: impl Fn([u8; N]) -> f32) {
    for (y, &bytes) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *y = number(bytes);
    }
}

#[inline(always)]
fn bf16(bytes: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}

/// A half, little endian, without a branch, so that loops over it become vectors. Nothing
/// subnormal takes part: processors are slow at that.
#[inline(always)]
pub fn f16(bytes: [u8; 2]) -> f32 {
    const TWO_TO_MINUS_24: f32 = f32::from_bits((127 - 24) << 23);
    let half = u16::from_le_bytes(bytes);
    let (sign, magnitude) = (u32::from(half & 0x8000), half & 0x7fff);
    // Exponents count from 15 in a half and from 127 here; the largest is an infinity's or a NaN's.
    let exponents = if magnitude < 0x7c00 { 127 - 15 } else { 255 - 31 };
    let normal = (u32::from(magnitude) << 13) + (exponents << 23);
    let subnormal = (f32::from(magnitude) * TWO_TO_MINUS_24).to_bits();
    f32::from_bits(sign << 16 | if magnitude < 0x400 { subnormal } else { normal })
}
