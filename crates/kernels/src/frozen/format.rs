use std::fmt::{Display, Formatter};

/// How the numbers of a frozen matrix are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// IEEE single precision, 4 bytes a number.
    F32,
    /// IEEE half precision, 2 bytes a number.
    F16,
    /// The upper half of single precision, 2 bytes a number.
    Bf16,
    /// 4-bit normal floats of bitsandbytes, a scale for every 64 numbers (`QLoRA`,
    /// <https://arxiv.org/abs/2305.14314>).
    Nf4,
    /// Bytes with a scale for every row, as bitsandbytes' `Linear8bitLt` keeps them (`LLM.int8()`,
    /// <https://arxiv.org/abs/2208.07339>).
    Int8,
    /// llama.cpp: 4 bits, a scale for every 32 numbers.
    Q4_0,
    /// llama.cpp: 4 bits, a scale and a minimum for every 32 numbers.
    Q4_1,
    /// llama.cpp: 5 bits, a scale for every 32 numbers.
    Q5_0,
    /// llama.cpp: 5 bits, a scale and a minimum for every 32 numbers.
    Q5_1,
    /// llama.cpp: 8 bits, a scale for every 32 numbers.
    Q8_0,
    /// llama.cpp: 4 bits, blocks of 256 whose eight parts have 6-bit scales and minima.
    Q4K,
    /// llama.cpp: 5 bits, blocks of 256 whose eight parts have 6-bit scales and minima.
    Q5K,
    /// llama.cpp: 6 bits, blocks of 256 whose sixteen parts have 8-bit scales.
    Q6K,
}

impl Format {
    /// Bytes that a matrix `[rows, cols]` takes; for [`Format::Nf4`] with its scales quantized
    /// once more. `usize::MAX` stands for more than that.
    pub fn bytes_for(self, rows: usize, cols: usize) -> usize {
        let Some(n) = rows.checked_mul(cols) else { return usize::MAX };
        match self {
            Self::Nf4 => {
                let scales = n.div_ceil(NF4_BLOCK);
                let nested = scales.div_ceil(NESTED_BLOCK);
                n.div_ceil(2).saturating_add(scales).saturating_add(4 * nested)
            }
            Self::Int8 => n.saturating_add(rows.saturating_mul(4)),
            _ => {
                let (numbers, bytes) = self.block();
                rows.saturating_mul(cols.div_ceil(numbers)).saturating_mul(bytes)
            }
        }
    }

    /// Numbers of a block and the bytes they take together, scales of their own beside them left
    /// out. A block of NF4 may run over the end of a row; those of llama.cpp never do.
    pub(super) fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Int8 => (1, 1),
            Self::Nf4 => (NF4_BLOCK, NF4_BLOCK / 2),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q6K => (256, 210),
        }
    }
}

/// Numbers that share a scale in NF4.
pub(super) const NF4_BLOCK: usize = 64;
/// NF4 scales that share a scale of their own.
pub(super) const NESTED_BLOCK: usize = 256;

impl Display for Format {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Nf4 => "nf4",
            Self::Int8 => "int8",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        })
    }
}

/// Why bytes are not the matrix they are taken for.
#[derive(Debug, Clone, thiserror::Error, PartialEq)]
pub enum FrozenError {
    /// More or fewer bytes than the shape needs.
    #[error("{part} of {format} [{rows}, {cols}]: expected {expected} bytes, found {found}")]
    Length {
        /// Which of the format's parts.
        part: &'static str,
        /// The format.
        format: Format,
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        cols: usize,
        /// Bytes that the shape needs.
        expected: usize,
        /// Bytes that are there.
        found: usize,
    },
    /// Rows that end inside a block.
    #[error("{format}: expected columns in multiples of {block}, found {cols}")]
    Columns {
        /// The format.
        format: Format,
        /// Columns of a block.
        block: usize,
        /// Columns of the matrix.
        cols: usize,
    },
    /// A format that this kind of matrix does not come in.
    #[error("expected {expected}, found {found}")]
    Kind {
        /// The formats that would do.
        expected: &'static str,
        /// The format asked for.
        found: Format,
    },
    /// An NF4 quantization of another kind than the one that is read here.
    #[error("quant_state: expected {key} {expected}, found {found}")]
    QuantState {
        /// The key in the JSON; `JSON` where that could not be read.
        key: &'static str,
        /// What is supported.
        expected: String,
        /// What the checkpoint says.
        found: String,
    },
}

impl FrozenError {
    pub(super) fn quant_state(key: &'static str, expected: &str, found: &dyn Display) -> Self {
        Self::QuantState { key, expected: expected.into(), found: found.to_string() }
    }
}
