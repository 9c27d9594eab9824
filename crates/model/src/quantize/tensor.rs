//! One tensor of a base as a quantized checkpoint keeps it.

use std::path::Path;

use pronk_kernels::{DYNAMIC_MAP, NF4_CODEBOOK, Nf4QuantState, Nf4Scales, quantize_int8, quantize_nf4};
use safetensors::Dtype;

use super::Scheme;
use crate::bitsandbytes::{
    ABSMAX, NESTED_ABSMAX, NESTED_QUANT_MAP, QUANT_MAP, QUANT_STATE, SCB, WEIGHT_FORMAT,
};
use crate::{HostTensor, ModelError, TensorSpec};

/// The longest that JSON makes of a number: its sign, seventeen digits, and an exponent.
const LONGEST_NUMBER: f64 = -2.225_073_858_507_201_4e-308;

/// Writes a tensor of the checkpoint that is being made.
pub type Sink<'a> = dyn FnMut(&str, &[u8]) -> Result<(), ModelError> + 'a;

/// A tensor of a base, and how a quantized checkpoint keeps it.
#[derive(Debug, Clone)]
pub struct QuantizedTensor {
    pub name: String,
    pub shape: Vec<usize>,
    kept: Kept,
}

#[derive(Debug, Clone, Copy)]
enum Kept {
    Dense(Dtype),
    /// With double quantization, and what it was in.
    Nf4([usize; 2], Dtype),
    Int8([usize; 2]),
}

impl QuantizedTensor {
    /// The base's tensor called `name`, which is kept in `source` there. Of what is quantized to a scheme, matrices are.
    pub fn new(scheme: Option<Scheme>, name: String, shape: Vec<usize>, source: Dtype) -> Self {
        let kept = match (&shape[..], scheme) {
            (&[rows, cols], Some(Scheme::Nf4)) => Kept::Nf4([rows, cols], source),
            (&[rows, cols], Some(Scheme::Int8)) => Kept::Int8([rows, cols]),
            // Embeddings and head are large and seldom the bottleneck; norms and biases are small.
            ([_, _], _) if source == Dtype::F32 => Kept::Dense(Dtype::BF16),
            _ => Kept::Dense(source),
        };
        Self { name, shape, kept }
    }

    /// A tensor that is kept as it is.
    pub fn dense(name: String, shape: Vec<usize>, dtype: Dtype) -> Self {
        Self { name, shape, kept: Kept::Dense(dtype) }
    }

    /// The tensors that it becomes.
    pub fn specs(&self) -> Vec<TensorSpec> {
        let spec = |name: String, dtype, shape: &[usize]| TensorSpec { name, dtype, shape: shape.into() };
        let part = |name: &str, dtype, shape: &[usize]| spec(format!("{}{name}", self.name), dtype, shape);
        match self.kept {
            Kept::Dense(dtype) => vec![spec(self.name.clone(), dtype, &self.shape)],
            Kept::Nf4([rows, cols], source) => {
                let numbers = rows.saturating_mul(cols);
                let blocks = numbers.div_ceil(64);
                vec![
                    part(QUANT_MAP, Dtype::F32, &[NF4_CODEBOOK.len()]),
                    part(NESTED_QUANT_MAP, Dtype::F32, &[DYNAMIC_MAP.len()]),
                    part(NESTED_ABSMAX, Dtype::F32, &[blocks.div_ceil(256)]),
                    spec(self.name.clone(), Dtype::U8, &[numbers.div_ceil(2), 1]),
                    part(ABSMAX, Dtype::U8, &[blocks]),
                    part(QUANT_STATE, Dtype::U8, &[state_length([rows, cols], source)]),
                ]
            }
            Kept::Int8([rows, _]) => vec![
                spec(format!("{}{SCB}", self.module()), Dtype::F32, &[rows]),
                spec(self.name.clone(), Dtype::I8, &self.shape),
                spec(format!("{}{WEIGHT_FORMAT}", self.module()), Dtype::U8, &[]),
            ],
        }
    }

    /// Writes the tensors that `host`, which is in `base`, becomes, but for those that
    /// [`constant`] knows.
    pub fn write(&self, base: &Path, host: HostTensor, sink: &mut Sink) -> Result<(), ModelError> {
        match self.kept {
            Kept::Dense(dtype) => sink(&self.name, &host.cast(dtype).bytes),
            Kept::Nf4(shape, source) => {
                let parts = quantize_nf4(&self.finite(base, &host)?, true);
                let json = state_json(shape, source, &parts.scales)?;
                if let Nf4Scales::Double { absmax, nested_absmax, .. } = &parts.scales {
                    sink(&format!("{}{NESTED_ABSMAX}", self.name), nested_absmax)?;
                    sink(&self.name, &parts.codes)?;
                    sink(&format!("{}{ABSMAX}", self.name), absmax)?;
                }
                sink(&format!("{}{QUANT_STATE}", self.name), &json)
            }
            Kept::Int8([rows, _]) => {
                let (codes, scales) = quantize_int8(&self.finite(base, &host)?, rows);
                sink(&format!("{}{SCB}", self.module()), &scales)?;
                sink(&self.name, &codes)
            }
        }
    }

    fn module(&self) -> &str {
        self.name.strip_suffix(".weight").unwrap_or(&self.name)
    }

    /// The numbers, all of them finite: one that is not would spoil its whole block.
    fn finite(&self, base: &Path, host: &HostTensor) -> Result<Vec<f32>, ModelError> {
        let values = host.to_f32();
        let Some(at) = values.iter().position(|x| !x.is_finite()) else { return Ok(values) };
        let problem = format!("{}: expected finite numbers, found {} at {at}", self.name, values[at]);
        Err(ModelError::malformed(base, format!("{problem}; the base is damaged: download it again")))
    }
}

/// The bytes of a tensor that is the same in every checkpoint.
pub fn constant(name: &str) -> Option<Vec<u8>> {
    let bytes = |map: &[f32]| map.iter().flat_map(|x| x.to_le_bytes()).collect();
    if name.ends_with(NESTED_QUANT_MAP) {
        Some(bytes(&DYNAMIC_MAP))
    } else if name.ends_with(QUANT_MAP) {
        Some(bytes(&NF4_CODEBOOK))
    } else {
        name.ends_with(WEIGHT_FORMAT).then(|| vec![0]) // rows one after another
    }
}

/// Bytes that the JSON of a matrix' state takes. They have to be known before it is quantized, and
/// with them the offset, is: room for any offset is left, and filled with spaces.
fn state_length(shape: [usize; 2], source: Dtype) -> usize {
    let mut state = Nf4QuantState::new(shape, torch_name(source), &no_scales());
    state.nested_offset = Some(LONGEST_NUMBER);
    state.to_json().map_or(0, |json| json.len().next_multiple_of(4))
}

fn state_json(shape: [usize; 2], source: Dtype, scales: &Nf4Scales) -> Result<Vec<u8>, ModelError> {
    let state = Nf4QuantState::new(shape, torch_name(source), scales).to_json();
    let mut json = state.map_err(|e| ModelError::malformed(QUANT_STATE.as_ref(), e.to_string()))?;
    json.resize(state_length(shape, source), b' ');
    Ok(json)
}

fn no_scales() -> Nf4Scales {
    quantize_nf4(&[], true).scales
}

fn torch_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        _ => "float32",
    }
}
