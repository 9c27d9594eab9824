#[cfg(feature = "cube")]
use std::borrow::Cow;
use std::sync::Arc;

use burn::tensor::{Device, Tensor};

#[cfg(feature = "cube")]
use super::cube::{self, CubeMatrix};
use super::{Format, FrozenMatrix, Precision};

/// Bytes of dense numbers that are alive at a time on a card. A whole matrix of a 13B's blocks fits, the
/// output projection of a large vocabulary comes in pieces.
pub const LARGEST_DENSE: usize = 192 << 20;
/// Pieces begin at multiples of as many rows, where the tiles of products do.
const PIECE_ROWS: usize = 128;

/// A frozen matrix where its products run. A clone shares the memory.
#[derive(Debug, Clone)]
pub enum FrozenWeight {
    /// In host memory.
    Host(Arc<FrozenMatrix>),
    /// In the memory of one of CubeCL's cards, in the same format.
    #[cfg(feature = "cube")]
    Cube(Arc<CubeMatrix>),
}

impl FrozenWeight {
    /// `[rows, cols]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::Host(matrix) => matrix.shape(),
            #[cfg(feature = "cube")]
            Self::Cube(matrix) => matrix.shape(),
        }
    }

    /// The same bytes on `device`, where that multiplies them by itself.
    pub fn on_card(matrix: &FrozenMatrix, device: &Device) -> Option<Self> {
        #[cfg(feature = "cube")]
        return CubeMatrix::on(device, matrix).map(|matrix| Self::Cube(Arc::new(matrix)));
        #[cfg(not(feature = "cube"))]
        {
            let _ = (matrix, device);
            None
        }
    }

    /// Rows `ids`, `[ids, cols]`, on `device`.
    ///
    /// # Panics
    /// Where an id is no row, or the matrix is on another card.
    pub fn rows(&self, ids: &[u32], device: &Device) -> Tensor<2> {
        match self {
            Self::Host(matrix) => Tensor::from_data(matrix.select(ids), device),
            #[cfg(feature = "cube")]
            Self::Cube(matrix) => cube::rows(matrix, ids, device),
        }
    }

    /// The squared norm of every row, `[rows]`, on `device`. Of a card's matrix a piece is dense at a time.
    ///
    /// # Panics
    /// Where the matrix is on another card.
    pub fn row_squares(&self, device: &Device) -> Tensor<1> {
        match self {
            Self::Host(matrix) => Tensor::from_data(matrix.row_squares(), device),
            #[cfg(feature = "cube")]
            Self::Cube(matrix) => {
                let [rows, cols] = matrix.shape();
                let step = dense_rows([rows, cols], size_of::<f32>(), LARGEST_DENSE).max(1);
                let piece = |first: usize| {
                    let ids: Vec<u32> = (first as u32..rows.min(first + step) as u32).collect();
                    cube::rows(matrix, &ids, device).square().sum_dim(1).squeeze_dim(1)
                };
                Tensor::cat((0..rows).step_by(step).map(piece).collect(), 0)
            }
        }
    }

    /// The matrix in host memory.
    ///
    /// # Panics
    /// Where it is on a card, as burn does where tensors of two devices meet.
    pub(super) fn on_host(&self) -> &FrozenMatrix {
        match self {
            Self::Host(matrix) => matrix,
            #[cfg(feature = "cube")]
            Self::Cube(_) => panic!("a tensor in host memory met a matrix on a graphics card"),
        }
    }

    /// The matrix on the card `device`: for as long as it is borrowed, where it lies in host memory.
    #[cfg(feature = "cube")]
    pub(super) fn on_cube(&self, device: &burn_cubecl::CubeDevice) -> Cow<'_, CubeMatrix> {
        match self {
            Self::Host(matrix) => Cow::Owned(CubeMatrix::new(matrix, device)),
            Self::Cube(matrix) => Cow::Borrowed(matrix),
        }
    }
}

/// How many rows of a matrix are dense at a time where `largest` bytes may be, `size` a number: all of
/// them, or one of as few pieces of the same size as it takes.
pub fn dense_rows([rows, cols]: [usize; 2], size: usize, largest: usize) -> usize {
    let pieces = rows.saturating_mul(cols).saturating_mul(size).div_ceil(largest).max(1);
    rows.div_ceil(pieces).next_multiple_of(PIECE_ROWS).min(rows)
}

/// Bytes that a product on a card spells out of a matrix of this shape: nothing of one that is kept as
/// products read it.
pub fn dense_bytes_on_card(format: Format, shape: [usize; 2], precision: Precision) -> usize {
    let (kept, size) = match precision {
        Precision::F32 => (Format::F32, 4),
        Precision::Bf16 => (Format::Bf16, 2),
    };
    if format == kept { 0 } else { dense_rows(shape, size, LARGEST_DENSE) * shape[1] * size }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_few_and_end_where_tiles_do() {
        // A 13B's widest matrix is dense as a whole, the head of a large vocabulary in six pieces.
        assert_eq!(dense_rows([13_824, 5120], 2, LARGEST_DENSE), 13_824);
        let rows = dense_rows([128_256, 4096], 2, LARGEST_DENSE);
        assert_eq!((rows, 128_256_usize.div_ceil(rows)), (21_376, 6));
        assert_eq!(dense_rows([3, 1 << 40], 4, LARGEST_DENSE), 3, "no piece is less than a tile, or nothing");
        assert_eq!(dense_rows([0, 5], 4, 1), 0);
    }

    #[test]
    fn what_lies_there_as_products_read_it_is_not_spelled_out() {
        let bytes = |format, precision| dense_bytes_on_card(format, [4096, 11_008], precision);
        assert_eq!(bytes(Format::Bf16, Precision::Bf16), 0);
        assert_eq!(bytes(Format::F32, Precision::F32), 0);
        assert_eq!(bytes(Format::Nf4, Precision::Bf16), 2 * 4096 * 11_008);
        assert_eq!(bytes(Format::Bf16, Precision::F32), 4 * 4096 * 11_008);
    }
}
