//! float32 to the formats that tensors have in a GGUF file.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use pronk_kernels::Format;
use rayon::prelude::*;
use safetensors::Dtype;

use super::formats;
use crate::HostTensor;

/// Numbers that a thread converts at a time, about.
const TASK: usize = 1 << 16;

/// How many bytes a tensor of this shape, rows first, takes; what is wrong where it cannot be kept so.
pub fn bytes(shape: &[usize], format: Format) -> Result<usize, String> {
    let dtype = known(format)?;
    let columns = shape.last().copied().unwrap_or(0);
    let block = dtype.block_size();
    if !columns.is_multiple_of(block) {
        return Err(format!("{format}: expected columns in multiples of {block}, found {columns}"));
    }
    let numbers = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
    numbers
        .and_then(|n| (n / block).checked_mul(dtype.type_size()))
        .ok_or_else(|| format!("shape {shape:?}: more numbers than there can be"))
}

/// `values` in `format`, whose blocks end where rows of `columns` do. The quantizers are candle's, which do what
/// llama.cpp's do.
pub fn encode(values: &[f32], columns: usize, format: Format) -> Result<Vec<u8>, String> {
    let dense = |dtype| HostTensor::from_f32(values, vec![values.len()], dtype).bytes.into_owned();
    match format {
        Format::F32 => return Ok(dense(Dtype::F32)),
        Format::F16 => return Ok(dense(Dtype::F16)),
        Format::Bf16 => return Ok(dense(Dtype::BF16)),
        _ => {}
    }
    let dtype = known(format)?;
    let rows = TASK.div_ceil(columns.max(1));
    let parts: Result<Vec<Vec<u8>>, candle_core::Error> =
        values.par_chunks(rows * columns.max(1)).map(|rows| quantize(rows, columns, dtype)).collect();
    Ok(parts.map_err(|e| e.to_string())?.concat())
}

fn quantize(values: &[f32], columns: usize, dtype: GgmlDType) -> candle_core::Result<Vec<u8>> {
    let tensor = Tensor::from_slice(values, (values.len() / columns.max(1), columns), &Device::Cpu)?;
    let quantized = match dtype {
        // candle's plain quantizer of this format is an older one of llama.cpp's. The one for weighted columns looks as
        // far for scales as llama.cpp does now; here all columns weigh the same.
        GgmlDType::Q4K => QTensor::quantize_imatrix(&tensor, &vec![1.0; columns], dtype)?,
        _ => QTensor::quantize(&tensor, dtype)?,
    };
    Ok(quantized.data()?.into_owned())
}

fn known(format: Format) -> Result<GgmlDType, String> {
    formats::dtype(format).ok_or_else(|| format!("{format} is no format of GGUF files"))
}
