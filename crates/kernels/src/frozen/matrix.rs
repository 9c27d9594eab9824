use std::ops::Range;

use burn::tensor::TensorData;
use bytes::Bytes;
use rayon::prelude::*;

use super::nf4::{Nf4Parts, Nf4Scales};
use super::wide::widest;
use super::{Format, FrozenError, dense, ggml, int8};
use crate::bf16::round;
use crate::cache_line::prefetch;

/// How far ahead rows are asked for that are read once, one after another.
const ROWS_AHEAD: usize = 2;

/// A frozen matrix `[rows, cols]` in host memory, mapped or owned, in the format it is kept in.
/// Row-major, blocks along the columns. A clone shares the memory.
#[derive(Debug, Clone)]
pub struct FrozenMatrix {
    format: Format,
    shape: [usize; 2],
    values: Values,
    /// Rows of a head, where those of its two halves alternate.
    interleaved: Option<usize>,
}

#[derive(Debug, Clone)]
enum Values {
    /// Floats, or llama.cpp's blocks.
    Whole(Bytes),
    Nf4(Nf4Parts),
    Int8 {
        codes: Bytes,
        scales: Bytes,
    },
}

impl FrozenMatrix {
    /// Floats, little endian: F32, F16 or BF16.
    ///
    /// # Errors
    /// If `format` is another, or `values` are not as long as `shape` says.
    pub fn dense(format: Format, shape: [usize; 2], values: Bytes) -> Result<Self, FrozenError> {
        match format {
            Format::F32 | Format::F16 | Format::Bf16 => Self::whole("values", format, shape, values),
            found => Err(FrozenError::Kind { expected: "f32, f16 or bf16", found }),
        }
    }

    /// Blocks of llama.cpp, any but the dense formats, NF4 and int8.
    ///
    /// # Errors
    /// If `format` is another, if rows end inside a block, or `blocks` are not as long as `shape`
    /// says.
    pub fn ggml(format: Format, shape: [usize; 2], blocks: Bytes) -> Result<Self, FrozenError> {
        match format {
            Format::F32 | Format::F16 | Format::Bf16 | Format::Nf4 | Format::Int8 => {
                return Err(FrozenError::Kind { expected: "one of llama.cpp's blocks", found: format });
            }
            _ => {}
        }
        let ([_, cols], (block, _)) = (shape, format.block());
        if !cols.is_multiple_of(block) {
            return Err(FrozenError::Columns { format, block, cols });
        }
        Self::whole("blocks", format, shape, blocks)
    }

    fn whole(
        part: &'static str,
        format: Format,
        shape: [usize; 2],
        bytes: Bytes,
    ) -> Result<Self, FrozenError> {
        check(part, format, shape, &bytes, format.bytes_for(shape[0], shape[1]))?;
        Ok(Self { format, shape, values: Values::Whole(bytes), interleaved: None })
    }

    /// NF4 of bitsandbytes.
    ///
    /// # Errors
    /// If a part is not as long as `shape` says.
    pub fn nf4(shape: [usize; 2], parts: Nf4Parts) -> Result<Self, FrozenError> {
        for (part, bytes, expected) in parts.pieces(shape[0].saturating_mul(shape[1])).into_iter().flatten() {
            check(part, Format::Nf4, shape, bytes, expected)?;
        }
        Ok(Self { format: Format::Nf4, shape, values: Values::Nf4(parts), interleaved: None })
    }

    /// int8 of bitsandbytes: `codes` are signed bytes, one a number, `scales` little-endian
    /// float32, the largest magnitude of every row (`SCB`).
    ///
    /// # Errors
    /// If a part is not as long as `shape` says.
    pub fn int8(shape: [usize; 2], codes: Bytes, scales: Bytes) -> Result<Self, FrozenError> {
        check("codes", Format::Int8, shape, &codes, shape[0].saturating_mul(shape[1]))?;
        check("scales", Format::Int8, shape, &scales, shape[0].saturating_mul(4))?;
        Ok(Self { format: Format::Int8, shape, values: Values::Int8 { codes, scales }, interleaved: None })
    }

    /// The same memory, read with the two halves of every head of `head_dim` rows apart. llama.cpp
    /// stores the rows of Llama's queries and keys with the halves alternating, because it turns
    /// neighbouring rows together; Hugging Face turns rows half a head apart.
    ///
    /// Rows that are no whole number of heads, or heads that have no halves, stay in their order.
    #[must_use]
    pub fn with_interleaved_heads(self, head_dim: usize) -> Self {
        let heads = head_dim > 0 && head_dim.is_multiple_of(2) && self.shape[0].is_multiple_of(head_dim);
        Self { interleaved: heads.then_some(head_dim), ..self }
    }

    /// `[rows, cols]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// How the numbers are kept.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Bytes of all parts together.
    pub fn byte_len(&self) -> usize {
        self.parts().map(Bytes::len).sum()
    }

    /// The pieces of memory it lies in, for telling the system which pages are needed.
    pub fn parts(&self) -> impl Iterator<Item = &Bytes> {
        let parts = match &self.values {
            Values::Whole(bytes) => [Some(bytes), None, None],
            Values::Nf4(parts) => parts.pieces(0).map(|piece| piece.map(|(_, bytes, _)| bytes)),
            Values::Int8 { codes, scales } => [Some(codes), Some(scales), None],
        };
        parts.into_iter().flatten()
    }

    /// The scales of an NF4 matrix.
    #[cfg_attr(not(feature = "cube"), allow(dead_code))]
    pub(super) fn nf4_scales(&self) -> Option<&Nf4Scales> {
        match &self.values {
            Values::Nf4(parts) => Some(&parts.scales),
            _ => None,
        }
    }

    /// Rows of a head, where those of its two halves alternate.
    #[cfg_attr(not(feature = "cube"), allow(dead_code))]
    pub(super) fn interleaved(&self) -> Option<usize> {
        self.interleaved
    }

    /// What the ends of a range of columns have to be multiples of, unless they are the row's
    /// end: 1 for floats and int8, 64 for NF4, 32 or 256 for llama.cpp's blocks.
    pub fn column_step(&self) -> usize {
        self.format.block().0
    }

    /// Writes the numbers `cols` of `row` into `out`, as float32.
    ///
    /// # Panics
    /// If `row` or `cols` lie outside of the matrix, an end of `cols` is neither a multiple of
    /// [`Self::column_step`] nor the row's end, or `out` is not as long as `cols`.
    pub fn dequantize(&self, row: usize, cols: Range<usize>, out: &mut [f32]) {
        let [rows, width] = self.shape;
        let on_step = |col: usize| col.is_multiple_of(self.column_step()) || col == width;
        assert!(row < rows && cols.start <= cols.end && cols.end <= width, "rows and columns that exist");
        assert!(on_step(cols.start) && on_step(cols.end), "columns from and to whole blocks");
        assert_eq!(out.len(), cols.len(), "room for every column");
        let row = self.row_in_memory(row);
        let first = row * width + cols.start;
        match &self.values {
            Values::Whole(bytes) => {
                let (numbers, size) = self.format.block();
                let bytes = &bytes[first / numbers * size..][..cols.len() / numbers * size];
                match self.format {
                    Format::F32 | Format::F16 | Format::Bf16 => dense::dequantize(self.format, bytes, out),
                    _ => ggml::dequantize(self.format, bytes, out),
                }
            }
            Values::Nf4(parts) => parts.dequantize(first, out),
            Values::Int8 { codes, scales } => {
                let scale = f32::from_le_bytes(scales.as_chunks().0[row]);
                int8::dequantize(&codes[first..][..cols.len()], scale, out);
            }
        }
    }

    /// The squared norm of every row, `[rows]`, summed in float64; a row of a thread is dense at a time.
    pub fn row_squares(&self) -> TensorData {
        let [rows, cols] = self.shape;
        let mut squares = vec![0.0_f32; rows];
        squares.par_iter_mut().enumerate().for_each_init(
            || vec![0.0; cols],
            |numbers, (row, square)| {
                self.dequantize(row, 0..cols, numbers);
                *square = numbers.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() as f32;
            },
        );
        TensorData::new(squares, [rows])
    }

    /// The same matrix with its numbers rounded to bf16, where it holds wider floats: half the memory
    /// of float32, and what products in bf16 round it to anyway.
    #[must_use]
    pub fn rounded_to_bf16(self) -> Self {
        let [rows, cols] = self.shape;
        if !matches!(self.format, Format::F32 | Format::F16) {
            return self;
        }
        let mut values = vec![0; Format::Bf16.bytes_for(rows, cols)];
        values.par_chunks_mut(2 * cols.max(1)).enumerate().for_each_init(
            || vec![0.0; cols],
            |numbers, (row, out)| {
                prefetch(self.stored(row + ROWS_AHEAD, 0..cols)); // files lie in pages that no processor foresees
                self.dequantize(row, 0..cols, numbers);
                widest!(|| {
                    let (halves, _) = out.as_chunks_mut::<2>();
                    for (half, &x) in halves.iter_mut().zip(&*numbers) {
                        *half = round(x).to_le_bytes();
                    }
                });
            },
        );
        let values = Values::Whole(Bytes::from(values));
        Self { format: Format::Bf16, shape: self.shape, values, interleaved: None }
    }

    /// Columns `cols` of `row`, where the matrix holds bf16 that can be read where it lies.
    pub(super) fn bf16(&self, row: usize, cols: Range<usize>) -> Option<&[u16]> {
        let readable = self.format == Format::Bf16 && cfg!(target_endian = "little");
        readable.then(|| bytemuck::try_cast_slice(self.stored(row, cols)).ok()).flatten()
    }

    /// Where the numbers or codes of columns `cols` of `row` lie, as far as there are such.
    pub(super) fn stored(&self, row: usize, cols: Range<usize>) -> &[u8] {
        let [rows, width] = self.shape;
        if row >= rows || cols.start >= width {
            return &[];
        }
        let row = self.row_in_memory(row) * width;
        let (first, end) = (row + cols.start, row + cols.end.min(width));
        let codes = match &self.values {
            Values::Whole(bytes) => bytes,
            Values::Nf4(parts) => &parts.codes,
            Values::Int8 { codes, .. } => codes,
        };
        let (numbers, size) = self.format.block();
        &codes[first / numbers * size..codes.len().min(end.div_ceil(numbers) * size)]
    }

    /// Where row `row` lies: `i + half * head_dim / 2` of a head lies at `2 * i + half` of it.
    fn row_in_memory(&self, row: usize) -> usize {
        let Some(head_dim) = self.interleaved else { return row };
        let (within, half_dim) = (row % head_dim, head_dim / 2);
        row - within + 2 * (within % half_dim) + within / half_dim
    }
}

fn check(
    part: &'static str,
    format: Format,
    [rows, cols]: [usize; 2],
    bytes: &Bytes,
    expected: usize,
) -> Result<(), FrozenError> {
    let found = bytes.len();
    if found == expected {
        return Ok(());
    }
    Err(FrozenError::Length { part, format, rows, cols, expected, found })
}
