//! Numbers to NF4, as bitsandbytes 0.50.2 does it on a CPU: the same codes, and the same scales but
//! for the last bit of their mean.
//!
//! Its CUDA kernels differ where it hardly shows. A block of zeros gets code 0 there (zero over zero
//! is no number, and fails every comparison), which double quantization then turns into something
//! beside zero; here as on the CPU it gets code 7, which is zero at any scale. A scale's nearest
//! code is found exactly there, here as on the CPU through a table of 65536 entries. And numbers
//! behind the last whole block are multiplied by the scale's reciprocal there, as all others are.

use bytes::Bytes;
use rayon::prelude::*;

use super::format::{NESTED_BLOCK, NF4_BLOCK};
use super::nf4::{DYNAMIC_MAP, NF4_CODEBOOK, Nf4Parts, Nf4Scales};
use super::wide::widest;

/// Blocks that a thread takes at a time.
const TASK: usize = 256;
/// The smallest scale that is divided by.
const SMALLEST: f32 = 1e-38;

/// Quantizes a flattened matrix of finite numbers to NF4, with or without double quantization.
///
/// The values of a bfloat16 or float16 weight are to be given as they are: bitsandbytes widens
/// them to float32 first as well.
pub fn quantize_nf4(values: &[f32], double: bool) -> Nf4Parts {
    let blocks = values.len().div_ceil(NF4_BLOCK);
    let (mut codes, mut scales) = (vec![0; values.len().div_ceil(2)], vec![0.0; blocks]);
    codes
        .par_chunks_mut(TASK * NF4_BLOCK / 2)
        .zip(scales.par_chunks_mut(TASK))
        .zip(values.par_chunks(TASK * NF4_BLOCK))
        .for_each(|((codes, scales), values)| widest!(|| quantize_blocks(values, codes, scales)));
    let scales =
        if double { quantize_scales(&scales) } else { Nf4Scales::Plain { absmax: le_bytes(&scales) } };
    Nf4Parts { codes: codes.into(), scales }
}

#[inline(always)]
fn quantize_blocks(values: &[f32], codes: &mut [u8], scales: &mut [f32]) {
    let bounds = bounds();
    let blocks = values.chunks(NF4_BLOCK).zip(codes.chunks_mut(NF4_BLOCK / 2));
    for ((values, codes), scale) in blocks.zip(scales) {
        if let (Some(values), Some(codes)) = (values.as_array(), codes.as_mut_array()) {
            *scale = quantize_block(values, codes, &bounds);
        } else {
            *scale = quantize_last(values, codes, &bounds);
        }
    }
}

/// Writes the codes of a whole block and returns its scale.
#[inline(always)]
fn quantize_block(values: &[f32; NF4_BLOCK], codes: &mut [u8; NF4_BLOCK / 2], bounds: &[f32; 15]) -> f32 {
    let scale = largest_magnitude(values);
    let factor = 1.0 / scale.max(SMALLEST);
    for (code, &[first, second]) in codes.iter_mut().zip(values.as_chunks().0) {
        *code = nearest(first * factor, bounds) << 4 | nearest(second * factor, bounds);
    }
    scale
}

/// The same for the numbers behind the last whole block. bitsandbytes divides by this scale, and
/// keeps it from zero. A number that is missing at the end counts as zero.
fn quantize_last(values: &[f32], codes: &mut [u8], bounds: &[f32; 15]) -> f32 {
    let scale = largest_magnitude(values).max(SMALLEST);
    for (code, pair) in codes.iter_mut().zip(values.chunks(2)) {
        let nearest = |i: usize| nearest(pair.get(i).map_or(0.0, |v| v / scale), bounds);
        *code = nearest(0) << 4 | nearest(1);
    }
    scale
}

#[inline(always)]
fn largest_magnitude(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |top, v| top.max(v.abs()))
}

/// The middles between neighbouring numbers of the codebook.
fn bounds() -> [f32; 15] {
    std::array::from_fn(|i| f32::midpoint(NF4_CODEBOOK[i], NF4_CODEBOOK[i + 1]))
}

/// The code whose number is nearest; the lower one of two. Counting the bounds below takes no
/// branch, so that many numbers are looked at together.
#[inline(always)]
fn nearest(v: f32, bounds: &[f32; 15]) -> u8 {
    bounds.iter().map(|&bound| u8::from(v > bound)).sum()
}

/// Double quantization: what the scales differ from their mean by, in blocks of 256.
fn quantize_scales(scales: &[f32]) -> Nf4Scales {
    // torch adds float32 in an order that depends on the processor; float64 has no such trouble.
    let mean = (scales.iter().map(|&s| f64::from(s)).sum::<f64>() / scales.len().max(1) as f64) as f32;
    let bounds: [f32; 255] = std::array::from_fn(|i| f32::midpoint(DYNAMIC_MAP[i], DYNAMIC_MAP[i + 1]));
    let mut absmax = Vec::with_capacity(scales.len());
    let mut nested_absmax = Vec::with_capacity(scales.len().div_ceil(NESTED_BLOCK));
    for block in scales.chunks(NESTED_BLOCK) {
        let largest = block.iter().fold(0.0, |top: f32, s| top.max((s - mean).abs()));
        let factor = 1.0 / largest;
        let code = |s: &f32| if largest == 0.0 { 0 } else { nearest_dynamic((s - mean) * factor, &bounds) };
        absmax.extend(block.iter().map(code));
        nested_absmax.push(largest);
    }
    Nf4Scales::Double { absmax: absmax.into(), nested_absmax: le_bytes(&nested_absmax), nested_offset: mean }
}

/// The code of the dynamic map that is nearest to `v`, within ±1, once that is rounded to the
/// grid of bitsandbytes' table; the lower one of two.
fn nearest_dynamic(v: f32, bounds: &[f32; 255]) -> u8 {
    const LAST: f32 = 65535.0;
    let entry = ((v.clamp(-1.0, 1.0) + 1.0) * 0.5 * LAST + 0.5).floor();
    let on_grid = 2.0 * entry / LAST - 1.0;
    bounds.partition_point(|&bound| bound < on_grid) as u8
}

fn le_bytes(numbers: &[f32]) -> Bytes {
    numbers.iter().flat_map(|x| x.to_le_bytes()).collect()
}
