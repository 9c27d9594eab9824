use std::borrow::Cow;

use half::{bf16, f16};
use safetensors::Dtype;

/// A tensor on the host, in the format and the bytes of its file.
#[derive(Debug, Clone)]
pub struct HostTensor<'a> {
    /// Its format: float32, float16 or bfloat16.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its numbers, little-endian, row by row.
    pub bytes: Cow<'a, [u8]>,
}

impl HostTensor<'_> {
    /// The numbers as float32.
    pub fn to_f32(&self) -> Vec<f32> {
        let halves = || self.bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
        match self.dtype {
            Dtype::F16 => halves().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
            Dtype::BF16 => halves().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
            _ => self.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        }
    }

    /// `values` in the format `dtype`, each rounded to the nearest.
    pub fn from_f32(values: &[f32], shape: Vec<usize>, dtype: Dtype) -> HostTensor<'static> {
        let bytes = match dtype {
            Dtype::F16 => values.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
            Dtype::BF16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        };
        HostTensor { dtype, shape, bytes: Cow::Owned(bytes) }
    }

    /// The same numbers in the format `dtype`.
    #[must_use]
    pub fn cast(self, dtype: Dtype) -> Self {
        if self.dtype == dtype { self } else { HostTensor::from_f32(&self.to_f32(), self.shape, dtype) }
    }
}
