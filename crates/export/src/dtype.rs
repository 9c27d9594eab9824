use std::fmt;
use std::str::FromStr;

use half::{bf16, f16};

use crate::ExportError;

/// A format that a merged model can be written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// float32: exact, and the largest.
    F32,
    /// float16: 11 bits of precision, nothing above 65504.
    F16,
    /// bfloat16: the range of float32, 8 bits of precision.
    Bf16,
}

impl Dtype {
    /// Every format, finest first.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// Its name in `config.json`.
    pub fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    /// How safetensors calls it.
    pub(crate) fn in_file(self) -> safetensors::Dtype {
        match self {
            Self::F32 => safetensors::Dtype::F32,
            Self::F16 => safetensors::Dtype::F16,
            Self::Bf16 => safetensors::Dtype::BF16,
        }
    }

    /// The format of a file's tensor; float32 for what no base is kept in.
    pub(crate) fn of_file(dtype: safetensors::Dtype) -> Self {
        Self::ALL.into_iter().find(|d| d.in_file() == dtype).unwrap_or(Self::F32)
    }

    /// Whether `x`, rounded to this format, is a finite number.
    pub(crate) fn holds(self, x: f32) -> bool {
        match self {
            Self::F32 => x.is_finite(),
            Self::F16 => f16::from_f32(x).is_finite(),
            Self::Bf16 => bf16::from_f32(x).is_finite(),
        }
    }

    /// Bytes a number takes.
    pub(crate) fn bytes(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }
}

/// The name that `--dtype` takes.
impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

impl FromStr for Dtype {
    type Err = ExportError;

    fn from_str(name: &str) -> Result<Self, ExportError> {
        let known = Self::ALL.into_iter().find(|d| d.to_string() == name);
        known.ok_or_else(|| ExportError::UnknownDtype { found: name.into() })
    }
}
