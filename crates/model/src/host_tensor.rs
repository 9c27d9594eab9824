use std::borrow::Cow;

use half::{bf16, f16};
use pronk_kernels::FrozenMatrix;
use rayon::prelude::*;
use safetensors::Dtype;

/// Numbers that a thread converts at a time, at least: fewer are not worth waking it.
const TASK: usize = 1 << 14;

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
        self.map(|x| x)
    }

    /// `values` in the format `dtype`, each rounded to the nearest.
    pub fn from_f32(values: &[f32], shape: Vec<usize>, dtype: Dtype) -> HostTensor<'static> {
        let each = values.par_iter().with_min_len(TASK);
        let bytes = match dtype {
            Dtype::F16 => each.map(|&x| f16::from_f32(x).to_le_bytes()).collect::<Vec<_>>().into_flattened(),
            Dtype::BF16 => {
                each.map(|&x| bf16::from_f32(x).to_le_bytes()).collect::<Vec<_>>().into_flattened()
            }
            _ => each.map(|x| x.to_le_bytes()).collect::<Vec<_>>().into_flattened(),
        };
        HostTensor { dtype, shape, bytes: Cow::Owned(bytes) }
    }

    /// The numbers of a frozen matrix, as float32.
    pub(crate) fn dequantized(matrix: &FrozenMatrix) -> HostTensor<'static> {
        let [rows, cols] = matrix.shape();
        let mut values = vec![0.0; rows * cols];
        // The width of a chunk must not be zero, and a matrix without columns has no numbers.
        let each = values.par_chunks_mut(cols.max(1)).enumerate();
        each.for_each(|(row, out)| matrix.dequantize(row, 0..cols, out));
        HostTensor::from_f32(&values, vec![rows, cols], Dtype::F32)
    }

    /// The same numbers in the format `dtype`. Nothing larger than the result is made on the way.
    #[must_use]
    pub fn cast(self, dtype: Dtype) -> Self {
        if self.dtype == dtype {
            return self;
        }
        let bytes = match dtype {
            Dtype::F16 => self.map(|x| f16::from_f32(x).to_le_bytes()).into_flattened(),
            Dtype::BF16 => self.map(|x| bf16::from_f32(x).to_le_bytes()).into_flattened(),
            _ => self.map(f32::to_le_bytes).into_flattened(),
        };
        HostTensor { dtype, shape: self.shape, bytes: Cow::Owned(bytes) }
    }

    fn map<R: Send>(&self, f: impl Fn(f32) -> R + Sync) -> Vec<R> {
        match self.dtype {
            Dtype::F16 => each(&self.bytes, |b| f(f16::from_le_bytes(b).to_f32())),
            Dtype::BF16 => each(&self.bytes, |b| f(bf16::from_le_bytes(b).to_f32())),
            _ => each(&self.bytes, |b| f(f32::from_le_bytes(b))),
        }
    }
}

fn each<const N: usize, R: Send>(bytes: &[u8], number: impl Fn([u8; N]) -> R + Sync) -> Vec<R> {
    bytes.as_chunks().0.par_iter().with_min_len(TASK).map(|&bytes| number(bytes)).collect()
}
