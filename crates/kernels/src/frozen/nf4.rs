//! NF4, the 4-bit normal floats of `QLoRA` (<https://arxiv.org/abs/2305.14314>), as bitsandbytes
//! keeps them: blocks of 64 numbers, each with its largest magnitude as a scale.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::FrozenError;
use super::format::{NESTED_BLOCK, NF4_BLOCK};
use super::wide::{Vectors, widest};

/// What the sixteen codes stand for: quantiles of the normal distribution, scaled to end at one
/// (`QLoRA`, appendix E). A checkpoint calls it `weight.quant_map`.
pub static NF4_CODEBOOK: [f32; 16] = CODEBOOK;

const CODEBOOK: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// What the 256 codes of a quantized scale stand for: bitsandbytes' signed dynamic map
/// (<https://arxiv.org/abs/1511.04561>), ascending. A checkpoint calls it `weight.nested_quant_map`.
pub static DYNAMIC_MAP: [f32; 256] = dynamic_map();

/// Each decade from 1e-6 to 1 has twice as many codes as the one below it, at the middles of
/// equal parts of the span from a tenth of the decade to the whole of it; both signs, 0 and 1.
const fn dynamic_map() -> [f32; 256] {
    const DECADES: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];
    let mut map = [0.0; 256];
    let (mut decade, mut above_zero) = (0, 0);
    while decade < DECADES.len() {
        let parts = 1 << decade;
        let mut part = 0;
        while part < parts {
            let middle = f32::midpoint(boundary(part, parts), boundary(part + 1, parts));
            above_zero += 1;
            map[127 + above_zero] = DECADES[decade] * middle;
            map[127 - above_zero] = -map[127 + above_zero];
            part += 1;
        }
        decade += 1;
    }
    map[255] = 1.0;
    map
}

/// Boundary `i` of the span from 0.1 to 1 cut into `parts`, as `torch.linspace` rounds it: counted
/// from the nearer end, product and sum rounded once.
const fn boundary(i: usize, parts: usize) -> f32 {
    let (first, last) = (0.1f32, 1.0f32);
    let step = (last - first) / parts as f32;
    if i <= parts / 2 {
        (first as f64 + step as f64 * i as f64) as f32
    } else {
        (last as f64 - step as f64 * (parts - i) as f64) as f32
    }
}

/// An NF4 matrix in pieces, named and laid out as in a checkpoint of bitsandbytes.
///
/// Blocks run over the flattened matrix, so that with `n` numbers there are `ceil(n / 64)`.
#[derive(Debug, Clone)]
pub struct Nf4Parts {
    /// `weight`, `[ceil(n / 2)]`: two codes a byte, the first in the upper half.
    pub codes: Bytes,
    /// The blocks' largest magnitudes.
    pub scales: Nf4Scales,
}

/// Scales of NF4 blocks. Numbers are little endian.
#[derive(Debug, Clone)]
pub enum Nf4Scales {
    /// As they are.
    Plain {
        /// `weight.absmax`, float32 `[blocks]`.
        absmax: Bytes,
    },
    /// Quantized once more, in blocks of 256 (double quantization): a scale is
    /// `DYNAMIC_MAP[absmax] * nested_absmax + nested_offset`.
    Double {
        /// `weight.absmax`, uint8 `[blocks]`.
        absmax: Bytes,
        /// `weight.nested_absmax`, float32 `[ceil(blocks / 256)]`.
        nested_absmax: Bytes,
        /// `nested_offset` of the JSON, the mean of the scales.
        nested_offset: f32,
    },
}

impl Nf4Parts {
    /// Every piece with its name, its bytes, and the bytes that `n` numbers need.
    pub(super) fn pieces(&self, n: usize) -> [Option<(&'static str, &Bytes, usize)>; 3] {
        let blocks = n.div_ceil(NF4_BLOCK);
        let codes = Some(("weight", &self.codes, n.div_ceil(2)));
        match &self.scales {
            Nf4Scales::Plain { absmax } => [codes, Some(("absmax", absmax, blocks.saturating_mul(4))), None],
            Nf4Scales::Double { absmax, nested_absmax, .. } => {
                let nested = blocks.div_ceil(NESTED_BLOCK).saturating_mul(4);
                [codes, Some(("absmax", absmax, blocks)), Some(("nested_absmax", nested_absmax, nested))]
            }
        }
    }

    /// The numbers from `start` of the flattened matrix on.
    pub(super) fn dequantize(&self, start: usize, out: &mut [f32]) {
        match Vectors::detect() {
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx512(vectors) => vectors.run(|| {
                self.dequantize_blocks(start, out, |codes, scale, out| {
                    avx512::whole_block(vectors, codes, scale, out);
                });
            }),
            _ => widest!(|| {
                self.dequantize_blocks(start, out, |codes, scale, out| {
                    dequantize_within_block(codes, 0, scale, out);
                });
            }),
        }
    }

    /// `whole` is for those blocks that are wanted from their first number to their last.
    #[inline(always)]
    fn dequantize_blocks(
        &self,
        start: usize,
        out: &mut [f32],
        whole: impl Fn(&[u8; NF4_BLOCK / 2], f32, &mut [f32; NF4_BLOCK]),
    ) {
        let (mut at, mut rest) = (start, out);
        while !rest.is_empty() {
            let length = (NF4_BLOCK - at % NF4_BLOCK).min(rest.len());
            let (within_block, later) = rest.split_at_mut(length);
            let scale = self.scales.scale(at / NF4_BLOCK);
            match (self.codes[at / 2..].first_chunk(), within_block.as_mut_array()) {
                (Some(codes), Some(block)) => whole(codes, scale, block),
                _ => dequantize_within_block(&self.codes, at, scale, within_block),
            }
            (at, rest) = (at + length, later);
        }
    }
}

impl Nf4Scales {
    #[inline(always)]
    fn scale(&self, block: usize) -> f32 {
        match self {
            Self::Plain { absmax } => float(absmax, block),
            Self::Double { absmax, nested_absmax, nested_offset } => {
                DYNAMIC_MAP[usize::from(absmax[block])] * float(nested_absmax, block / NESTED_BLOCK)
                    + nested_offset
            }
        }
    }
}

#[inline(always)]
fn float(bytes: &[u8], i: usize) -> f32 {
    f32::from_le_bytes(bytes.as_chunks().0[i])
}

/// A byte to its two numbers: one look-up where the codebook itself would need two.
static PAIRS: [[f32; 2]; 256] = {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [CODEBOOK[byte >> 4], CODEBOOK[byte & 15]];
        byte += 1;
    }
    pairs
};

/// Numbers that share `scale`, from `at` of the flattened matrix on. They may begin with the
/// second number of a byte and end with the first of another.
#[inline(always)]
fn dequantize_within_block(codes: &[u8], at: usize, scale: f32, out: &mut [f32]) {
    let (head, out) = out.split_at_mut(out.len().min(at % 2));
    if let [first] = head {
        *first = PAIRS[usize::from(codes[at / 2])][1] * scale;
    }
    let codes = &codes[at.div_ceil(2)..];
    let (pairs, last) = out.as_chunks_mut::<2>();
    for (y, &code) in pairs.iter_mut().zip(codes) {
        *y = PAIRS[usize::from(code)].map(|number| number * scale);
    }
    if let ([last], Some(&code)) = (last, codes.get(pairs.len())) {
        *last = PAIRS[usize::from(code)][0] * scale;
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        _mm_cvtsi64_si128, _mm512_cvtepu8_epi64, _mm512_loadu_ps, _mm512_mul_ps, _mm512_or_si512,
        _mm512_permutexvar_ps, _mm512_set1_ps, _mm512_slli_epi64, _mm512_srli_epi64, _mm512_storeu_ps,
    };

    use super::{CODEBOOK, NF4_BLOCK};
    use crate::frozen::wide::Avx512;

    /// The whole codebook lies in one register: sixteen codes are looked up by one instruction, to which compilers do not come.
    #[inline(always)]
    pub(super) fn whole_block(
        _: Avx512,
        codes: &[u8; NF4_BLOCK / 2],
        scale: f32,
        out: &mut [f32; NF4_BLOCK],
    ) {
        // SAFETY: the processor has avx512f, of which the first argument is the proof.
        #[allow(unsafe_code)]
        unsafe {
            look_up(codes, scale, out);
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn look_up(codes: &[u8; NF4_BLOCK / 2], scale: f32, out: &mut [f32; NF4_BLOCK]) {
        let scale = _mm512_set1_ps(scale);
        let (eights, sixteens) = (codes.as_chunks().0, out.as_chunks_mut::<16>().0);
        for (eight, sixteen) in eights.iter().zip(sixteens) {
            // The look-up reads the lowest four bits of 32: of a byte first its upper half, then its lower.
            let bytes = _mm512_cvtepu8_epi64(_mm_cvtsi64_si128(i64::from_le_bytes(*eight)));
            let halves = _mm512_or_si512(_mm512_srli_epi64::<4>(bytes), _mm512_slli_epi64::<32>(bytes));
            // SAFETY: 16 numbers are read, and 16 written.
            #[allow(unsafe_code)]
            unsafe {
                let numbers = _mm512_permutexvar_ps(halves, _mm512_loadu_ps(CODEBOOK.as_ptr()));
                _mm512_storeu_ps(sixteen.as_mut_ptr(), _mm512_mul_ps(numbers, scale));
            }
        }
    }
}

/// What bitsandbytes keeps about an NF4 weight beside its tensors: the JSON in
/// `weight.quant_state.bitsandbytes__nf4`, in its order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Nf4QuantState {
    /// `nf4`.
    pub quant_type: String,
    /// Numbers that share a scale, 64.
    pub blocksize: usize,
    /// What the weight was before, and becomes again: `bfloat16`, `float16` or `float32`.
    pub dtype: String,
    /// Shape of the matrix, `[rows, cols]`.
    pub shape: Vec<usize>,
    /// Scales that share a scale, 256; with double quantization only, as are the next two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nested_blocksize: Option<usize>,
    /// What the scales were before, `float32`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nested_dtype: Option<String>,
    /// Mean of the scales.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nested_offset: Option<f64>,
}

impl Nf4QuantState {
    /// The state of a matrix with these scales that was `dtype` (`bfloat16`, `float16`, `float32`).
    pub fn new([rows, cols]: [usize; 2], dtype: &str, scales: &Nf4Scales) -> Self {
        let offset = match scales {
            Nf4Scales::Plain { .. } => None,
            Nf4Scales::Double { nested_offset, .. } => Some(f64::from(*nested_offset)),
        };
        Self {
            quant_type: "nf4".into(),
            blocksize: NF4_BLOCK,
            dtype: dtype.into(),
            shape: vec![rows, cols],
            nested_blocksize: offset.map(|_| NESTED_BLOCK),
            nested_dtype: offset.map(|_| "float32".into()),
            nested_offset: offset,
        }
    }

    /// The JSON's bytes, which a checkpoint holds as a uint8 tensor.
    ///
    /// # Errors
    /// If an offset is no finite number, which JSON cannot hold.
    pub fn to_json(&self) -> Result<Vec<u8>, FrozenError> {
        let malformed = |e: serde_json::Error| FrozenError::quant_state("JSON", "", &e);
        if let Some(offset) = self.nested_offset.filter(|offset| !offset.is_finite()) {
            return Err(FrozenError::quant_state("nested_offset", "a finite number", &offset));
        }
        serde_json::to_vec(self).map_err(malformed)
    }

    /// Reads the JSON of a checkpoint.
    ///
    /// # Errors
    /// If it is none, or says that the weight is anything but a matrix in the NF4 read here.
    pub fn from_json(json: &[u8]) -> Result<Self, FrozenError> {
        let state: Self = serde_json::from_slice(json)
            .map_err(|e| FrozenError::quant_state("JSON", "of an NF4 matrix", &e))?;
        state.check()?;
        Ok(state)
    }

    fn check(&self) -> Result<(), FrozenError> {
        let differs = FrozenError::quant_state;
        if self.quant_type != "nf4" {
            return Err(differs("quant_type", "nf4", &self.quant_type));
        }
        if self.blocksize != NF4_BLOCK {
            return Err(differs("blocksize", "64", &self.blocksize));
        }
        if self.shape.len() != 2 {
            return Err(differs("shape", "[rows, cols]", &format_args!("{:?}", self.shape)));
        }
        match self.nested_blocksize {
            Some(size) if size != NESTED_BLOCK => Err(differs("nested_blocksize", "256", &size)),
            Some(_) if self.nested_offset.is_none() => Err(differs("nested_offset", "a number", &"none")),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp)] // the same products of the same numbers
mod tests {
    use super::*;

    /// From and to everywhere in a matrix that ends within a block, and within a byte.
    #[test]
    fn every_part_of_a_matrix_is_what_its_codes_say() {
        const COUNT: usize = 2 * NF4_BLOCK + 3;
        let codes: Vec<u8> = (0..COUNT.div_ceil(2)).map(|i| (i * 37 + 11) as u8).collect();
        let scales = [0.5_f32, 2.0, 3.0];
        let expected: Vec<f32> = (0..COUNT)
            .map(|i| {
                let byte = codes[i / 2];
                let code = if i % 2 == 0 { byte >> 4 } else { byte & 15 };
                NF4_CODEBOOK[usize::from(code)] * scales[i / NF4_BLOCK]
            })
            .collect();
        let absmax: Vec<u8> = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        let parts = Nf4Parts { codes: codes.into(), scales: Nf4Scales::Plain { absmax: absmax.into() } };
        let step = if cfg!(miri) { 21 } else { 1 };
        for start in (0..COUNT).step_by(step) {
            for end in (start..=COUNT).rev().step_by(step) {
                let mut found = vec![f32::NAN; end - start];
                parts.dequantize(start, &mut found);
                assert_eq!(found, expected[start..end], "{start} to {end}");
            }
        }
    }
}
