use std::fmt;
use std::str::FromStr;

use pronk_kernels::Format;

use crate::{Dtype, ExportError};

/// What a merged GGUF file keeps its matrices in. Everything else in it is float32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GgufType {
    /// float32.
    F32,
    /// float16.
    F16,
    /// bfloat16.
    Bf16,
    /// 8 bits, a scale for every 32 numbers.
    Q8_0,
    /// 4 bits, a scale for every 32 numbers; the head in `Q6_K`, as llama.cpp has it.
    Q4_0,
    /// 4 bits, blocks of 256 whose eight parts have scales and minima; the head in `Q6_K`.
    Q4K,
}

impl GgufType {
    /// Every type, finest first.
    pub const ALL: [Self; 6] = [Self::F32, Self::F16, Self::Bf16, Self::Q8_0, Self::Q4_0, Self::Q4K];

    /// `general.file_type`, llama.cpp's `llama_ftype`.
    pub(crate) fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 7,
            Self::Q4K => 14, // "Q4_K_S": no matrix of a block in more bits than the others
            Self::Bf16 => 32,
        }
    }

    /// Whether it is a quantization.
    pub(crate) fn is_quantized(self) -> bool {
        matches!(self, Self::Q8_0 | Self::Q4_0 | Self::Q4K)
    }

    /// What a matrix with rows of `columns` numbers is kept in: the head in more bits, and in the next format that
    /// there is where its rows are no whole number of blocks, both as llama.cpp's own quantizer does.
    pub(crate) fn format(self, columns: usize, is_head: bool) -> Format {
        let wanted = match self {
            Self::F32 => return Format::F32,
            Self::F16 => return Format::F16,
            Self::Bf16 => return Format::Bf16,
            Self::Q8_0 => Format::Q8_0,
            Self::Q4_0 | Self::Q4K if is_head => Format::Q6K,
            Self::Q4_0 => Format::Q4_0,
            Self::Q4K => Format::Q4K,
        };
        match wanted {
            _ if !columns.is_multiple_of(32) => Format::F16,
            Format::Q4K if !columns.is_multiple_of(256) => Format::Q5_0,
            Format::Q6K if !columns.is_multiple_of(256) => Format::Q8_0,
            wanted => wanted,
        }
    }
}

impl From<Dtype> for GgufType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::F16 => Self::F16,
            Dtype::Bf16 => Self::Bf16,
        }
    }
}

/// The name that `--gguf-type` takes.
impl fmt::Display for GgufType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4K => "q4_k",
        })
    }
}

impl FromStr for GgufType {
    type Err = ExportError;

    fn from_str(name: &str) -> Result<Self, ExportError> {
        let known = Self::ALL.into_iter().find(|kind| kind.to_string() == name);
        known.ok_or_else(|| ExportError::UnknownGgufType { found: name.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_no_block_fits_get_the_next_format() {
        assert_eq!(GgufType::Q4K.format(1536, false), Format::Q4K);
        assert_eq!(GgufType::Q4K.format(576, false), Format::Q5_0);
        assert_eq!(GgufType::Q4K.format(512, true), Format::Q6K);
        assert_eq!(GgufType::Q4_0.format(576, true), Format::Q8_0);
        assert_eq!(GgufType::Q4_0.format(576, false), Format::Q4_0);
        assert_eq!(GgufType::Q8_0.format(40, false), Format::F16);
        assert_eq!(GgufType::F32.format(7, true), Format::F32);
        for kind in GgufType::ALL {
            assert_eq!(kind.to_string().parse::<GgufType>().unwrap(), kind);
        }
    }
}
