//! Bytes with a scale for every row, as bitsandbytes' `Linear8bitLt` keeps them.

use bytes::Bytes;
use rayon::prelude::*;

use super::wide::widest;

/// bitsandbytes' 1 / 127. It multiplies by it last, and so does this.
const ONE_127TH: f32 = 7.874_016e-3;

/// The numbers of a row, or of a part of one, whose scale is `scale`.
pub fn dequantize(codes: &[u8], scale: f32, out: &mut [f32]) {
    widest!(|| {
        for (y, &code) in out.iter_mut().zip(codes) {
            *y = f32::from(code.cast_signed()) * scale * ONE_127TH;
        }
    });
}

/// Quantizes finite `values`, row-major, by their rows' largest magnitudes: `LLM.int8()`'s weights
/// (<https://arxiv.org/abs/2208.07339>).
///
/// The codes are signed bytes, `round(v * 127 / scale)` with ties to even, one a number, and the
/// scales little-endian float32, one a row: what a checkpoint calls `weight` and `SCB`. A row of
/// zeros has the scale zero and codes of zero.
///
/// `Linear8bitLt` rounds weights to float16 before; this does not. Of bfloat16 weights that changes
/// only those below float16's normal numbers, of float32 weights a code in a few hundred.
///
/// # Panics
/// If `values` cannot be cut into that many rows.
pub fn quantize_int8(values: &[f32], rows: usize) -> (Bytes, Bytes) {
    let cols = values.len().checked_div(rows).unwrap_or(0);
    assert_eq!(rows * cols, values.len(), "rows of the same length");
    if cols == 0 {
        return (Bytes::new(), Bytes::from(vec![0; rows * 4]));
    }
    let mut codes = vec![0; values.len()];
    let scales: Vec<[u8; 4]> = codes
        .par_chunks_mut(cols)
        .zip(values.par_chunks(cols))
        .map(|(codes, values)| widest!(|| quantize_row(values, codes)).to_le_bytes())
        .collect();
    (codes.into(), scales.into_flattened().into())
}

/// Writes a row's codes and returns its scale.
#[inline(always)]
fn quantize_row(values: &[f32], codes: &mut [u8]) -> f32 {
    let scale = values.iter().fold(0.0, |top: f32, v| top.max(v.abs()));
    // Through the reciprocal, as in torch `127 / tensor` is: the last bit decides about ties.
    let factor = if scale > 0.0 { 127.0 * (1.0 / scale) } else { 0.0 };
    for (code, &v) in codes.iter_mut().zip(values) {
        *code = ((v * factor).round_ties_even() as i8).cast_unsigned();
    }
    scale
}
