//! Frozen matrices in the memory of a graphics card, in the format that they are kept in. For a
//! product, a kernel spells the matrix out in the type that the card multiplies best, the product
//! reads that, and it is let go: never is more than one matrix dense, nor more than
//! [`LARGEST_DENSE`] bytes of a huge one.

mod decode;

use std::ops::Range;
use std::sync::Arc;

use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Cube, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::{Bytes, DType, Device, Int, Shape, Tensor, TensorData};
use burn_cubecl::cubecl::ir::AddressType;
use burn_cubecl::cubecl::prelude::BufferArg;
use burn_cubecl::cubecl::tensor_vector_size_parallel;
use burn_cubecl::kernel::{cast, into_contiguous, slice};
use burn_cubecl::{CubeDevice, tensor::CubeTensor};

use self::decode::{Kept, NF4_TABLE, PlaceLaunch, spell_out};
use super::weight::{LARGEST_DENSE, dense_rows};
use super::{DYNAMIC_MAP, Format, FrozenMatrix, NF4_CODEBOOK, Nf4Scales, Precision};
use crate::card::{card_of, element, elements, empty, factor_type, multiply};
use crate::direction::Direction;

/// Numbers that every format has under one scale, where they begin at a multiple of as many.
const TOGETHER: usize = 16;

/// A frozen matrix `[rows, cols]` on a card. A clone shares the memory.
#[derive(Debug, Clone)]
pub struct CubeMatrix {
    /// All parts, one behind another, each from a whole word on.
    words: CubeTensor,
    kept: Kept,
    shape: [usize; 2],
    /// Words in front of the scales, and of the scales of those.
    scales: usize,
    nested: usize,
}

impl CubeMatrix {
    /// The same bytes on `device`, where that is a card of CubeCL's.
    pub fn on(device: &Device, w: &FrozenMatrix) -> Option<Self> {
        card_of(device).map(|card| Self::new(w, &card))
    }

    /// The same bytes on `device`.
    pub fn new(w: &FrozenMatrix, device: &CubeDevice) -> Self {
        let mut bytes = nf4_table(w);
        let mut starts = Vec::new();
        for part in w.parts() {
            starts.push(bytes.len() / 4);
            bytes.extend_from_slice(part);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        let words = Shape::new([bytes.len() / 4]);
        let client = device.client();
        let mut bytes = Bytes::from_bytes_vec(bytes);
        client.staging(std::iter::once(&mut bytes), false); // pinned, where the driver has such memory
        let handle = client.create(bytes);
        let start = |part: usize| starts.get(part).copied().unwrap_or(0);
        Self {
            words: CubeTensor::new_contiguous(client, device.clone(), words, handle, DType::U32),
            kept: Kept {
                format: w.format(),
                nested: matches!(w.nf4_scales(), Some(Nf4Scales::Double { .. })),
                interleaved: w.interleaved().unwrap_or(0),
            },
            shape: w.shape(),
            scales: start(1),
            nested: start(2),
        }
    }

    /// `[rows, cols]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// `x W^T` or `x W`, in float32; factors as `precision` says.
    pub fn product(&self, x: CubeTensor, direction: Direction, precision: Precision) -> CubeTensor {
        let factors = factor_type(precision, &x.client);
        self.product_of(factors, LARGEST_DENSE, x, direction)
    }

    /// The product of factors in this type, with at most so many bytes of dense numbers.
    fn product_of(&self, factors: DType, largest: usize, x: CubeTensor, direction: Direction) -> CubeTensor {
        let [rows, cols] = self.shape;
        let tokens = x.shape()[0];
        if tokens == 0 {
            let width = if direction == Direction::Forward { rows } else { cols };
            return Cube::float_zeros(Shape::new([0, width]), &x.device, x.dtype.into());
        }
        let x = cast(x, factors);
        let pieces = self.pieces(factors, largest);
        match direction {
            Direction::Forward => {
                let product = |rows| multiply(x.clone(), Cube::float_transpose(self.dense(rows, factors)));
                let mut columns: Vec<_> = pieces.map(product).collect();
                if columns.len() == 1 { columns.swap_remove(0) } else { Cube::float_cat(columns, 1) }
            }
            Direction::Backward => {
                let product = |rows: Range<usize>| {
                    let dy = if rows.len() == self.shape[0] {
                        x.clone()
                    } else {
                        slice(x.clone(), &[0..tokens, rows.clone()])
                    };
                    multiply(dy, self.dense(rows, factors))
                };
                let sum = pieces.map(product).reduce(Cube::float_add);
                sum.unwrap_or_else(|| {
                    Cube::float_zeros(Shape::new([tokens, cols]), &x.device, DType::F32.into())
                })
            }
        }
    }

    /// Ranges of rows whose dense numbers are alive together.
    fn pieces(&self, dtype: DType, largest: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let [rows, cols] = self.shape;
        let whole = self.is_kept_in(dtype);
        let step = if whole { rows } else { dense_rows([rows, cols], dtype.size(), largest) };
        (0..rows).step_by(step.max(1)).map(move |first| first..rows.min(first + step))
    }

    /// Whether the matrix lies there as products read it.
    fn is_kept_in(&self, dtype: DType) -> bool {
        let kept = match self.kept.format {
            Format::F32 => dtype == DType::F32,
            Format::F16 => dtype == DType::F16,
            Format::Bf16 => dtype == DType::BF16,
            _ => false,
        };
        kept && self.kept.interleaved == 0
    }

    /// `[rows, cols]` of these rows.
    fn dense(&self, rows: Range<usize>, dtype: DType) -> CubeTensor {
        if rows.len() == self.shape[0] && self.is_kept_in(dtype) {
            let CubeTensor { client, handle, device, .. } = self.words.clone();
            return CubeTensor::new_contiguous(client, device, Shape::new(self.shape), handle, dtype);
        }
        self.spelled_out(rows.len(), rows.start, None, dtype)
    }

    /// Rows `ids`, `[ids, cols]`, in float32.
    fn select(&self, ids: CubeTensor) -> CubeTensor {
        self.spelled_out(ids.shape()[0], 0, Some(into_contiguous(ids)), DType::F32)
    }

    /// So many rows from `first` on, or those that `ids` names.
    fn spelled_out(&self, rows: usize, first: usize, ids: Option<CubeTensor>, dtype: DType) -> CubeTensor {
        let [_, cols] = self.shape;
        let client = &self.words.client;
        let out = empty(&self.words, [rows, cols], dtype);
        if rows * cols == 0 {
            return out;
        }
        let sizes = client.io_optimized_vector_sizes(dtype.size()).filter(|&size| size <= TOGETHER);
        let lanes = tensor_vector_size_parallel(sizes, out.meta.shape(), out.meta.strides(), 1);
        let vectors = rows * cols / lanes;
        let (count, dim) = elements(client, vectors);
        let words = self.words.meta.num_elements();
        let id_type = ids.as_ref().map_or(DType::I32, |ids| ids.dtype);
        // SAFETY: a unit writes one of `vectors` vectors of `out`, which is as large as they are
        // together. It reads words of the matrix that `FrozenMatrix` has checked to be there, of rows
        // from `first` on that the caller cut out of the matrix, or of rows that exist by `select`'s
        // contract.
        #[allow(unsafe_code)]
        unsafe {
            spell_out::launch_unchecked(
                client,
                count,
                dim,
                AddressType::from_len(4 * words),
                lanes,
                BufferArg::from_raw_parts(self.words.handle.clone(), words),
                ids.map(CubeTensor::into_buffer_arg).into(),
                out.clone().into_buffer_arg(),
                PlaceLaunch::new(vectors, cols, first, self.scales, self.nested),
                self.kept,
                [element(dtype), element(id_type)],
            );
        }
        out
    }
}

/// What the kernel looks codes up in: nothing but for NF4.
fn nf4_table(w: &FrozenMatrix) -> Vec<u8> {
    let Some(scales) = w.nf4_scales() else { return Vec::new() };
    let offset = match scales {
        Nf4Scales::Plain { .. } => 0.0,
        Nf4Scales::Double { nested_offset, .. } => *nested_offset,
    };
    let table = NF4_CODEBOOK.iter().chain(&DYNAMIC_MAP).chain(std::iter::once(&offset));
    let bytes: Vec<u8> = table.flat_map(|x| x.to_le_bytes()).collect();
    debug_assert_eq!(bytes.len(), 4 * NF4_TABLE);
    bytes
}

/// Rows `ids` of a matrix on a card, `[ids, cols]`.
///
/// # Panics
/// Where an id is no row.
pub fn rows(w: &Arc<CubeMatrix>, ids: &[u32], device: &Device) -> Tensor<2> {
    let rows = w.shape[0];
    assert!(ids.iter().all(|&id| (id as usize) < rows), "rows that exist");
    let indices: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
    let ids = Tensor::<1, Int>::from_data(TensorData::new(indices, [ids.len()]), device);
    Tensor::from_dispatch(Dispatch::frozen_rows(ids.into_dispatch(), Arc::clone(w)))
}

/// The operation; only rows of the ids asked for are ever dense.
#[backend_extension(Cube)]
pub trait FrozenRows: Backend {
    /// Rows `ids`, which exist.
    fn frozen_rows(ids: IntTensor<Self>, w: Arc<CubeMatrix>) -> FloatTensor<Self>;
}

impl FrozenRows for Cube {
    fn frozen_rows(ids: IntTensor<Self>, w: Arc<CubeMatrix>) -> FloatTensor<Self> {
        w.select(ids)
    }
}

#[cfg(all(test, feature = "cubecl-cpu"))]
#[allow(clippy::unwrap_used)] // a test reports by panicking
mod tests {
    use burn::backend::try_read_sync;

    use super::*;

    /// More would take this runtime half a minute.
    const TOKENS: usize = 1;

    fn card() -> CubeDevice {
        CubeDevice::Cpu(burn::backend::cpu::CpuDevice)
    }

    fn numbers(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919) % 257) as f32 / 128.0 - 1.0).collect()
    }

    fn tensor(values: &[f32], width: usize) -> CubeTensor {
        let data = TensorData::new(values.to_vec(), [values.len() / width, width]);
        Cube::float_from_data(data, &card())
    }

    fn close(what: &str, found: CubeTensor, expected: &[f32], tolerance: f32) {
        assert_eq!(found.dtype, DType::F32, "{what}");
        let data = try_read_sync(Cube::float_into_data(found)).unwrap().unwrap();
        let found = data.as_slice::<f32>().unwrap();
        let top = expected.iter().fold(0.0, |top: f32, x| top.max(x.abs()));
        let worst = found.iter().zip(expected).fold(0.0, |worst: f32, (a, b)| worst.max((a - b).abs()));
        assert_eq!(found.len(), expected.len(), "{what}");
        assert!(worst <= tolerance * top, "{what}: {worst} off, of {top}");
    }

    /// Pieces of 128, 128 and 4 rows, and factors of 16 bits: float16, as this runtime has no bf16.
    #[test]
    fn pieces_and_short_factors_give_the_same_product() {
        let [rows, cols] = [260, 24];
        let values: Vec<u8> = numbers(rows * cols).iter().flat_map(|x| x.to_le_bytes()).collect();
        let exact = FrozenMatrix::dense(Format::F32, [rows, cols], values.into()).unwrap();
        let w = CubeMatrix::new(&exact.clone().with_interleaved_heads(52), &card());
        let exact = exact.with_interleaved_heads(52);
        let (x, dy) = (numbers(TOKENS * cols), numbers(TOKENS * rows));
        let y = exact.forward(&x, Precision::F32);
        let dx = exact.backward(&dy, Precision::F32);
        for (factors, tolerance) in [(DType::F32, 1e-5), (DType::F16, 2e-3)] {
            for largest in [usize::MAX, 100 * cols * factors.size()] {
                let what = format!("{factors:?}, at most {largest} bytes dense");
                let pieces = w.pieces(factors, largest).count();
                assert_eq!(pieces, if largest == usize::MAX { 1 } else { 3 }, "{what}");
                let product = |x, direction| w.product_of(factors, largest, x, direction);
                close(&what, product(tensor(&x, cols), Direction::Forward), &y, tolerance);
                close(&what, product(tensor(&dy, rows), Direction::Backward), &dx, tolerance);
            }
        }
    }

    /// What is kept in the type of the factors is multiplied where it lies.
    #[test]
    fn a_matrix_that_lies_there_dense_is_not_copied() {
        let halves: Vec<u8> = (0..48u16).flat_map(|i| (0x3c00 + i).to_le_bytes()).collect();
        let w = FrozenMatrix::dense(Format::F16, [8, 6], halves.into()).unwrap();
        let turned = CubeMatrix::new(&w.clone().with_interleaved_heads(4), &card());
        let there = CubeMatrix::new(&w, &card());
        assert!(there.is_kept_in(DType::F16) && !there.is_kept_in(DType::F32));
        assert!(!turned.is_kept_in(DType::F16));
        let x = numbers(TOKENS * 6);
        for w_on_card in [&there, &turned] {
            let y = w_on_card.product_of(DType::F16, usize::MAX, tensor(&x, 6), Direction::Forward);
            let w =
                if w_on_card.kept.interleaved == 0 { w.clone() } else { w.clone().with_interleaved_heads(4) };
            close("halves", y, &w.forward(&x, Precision::F32), 2e-3);
        }
    }
}
