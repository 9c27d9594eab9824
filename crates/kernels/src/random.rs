// Loops have to end up inside the functions of `wide` that are compiled for wider vectors.
#![allow(clippy::inline_always)]

use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;

use burn::tensor::{Tensor, TensorData};
use rayon::prelude::*;

use crate::dropout::DropoutKey;
use crate::frozen::wide::widest;

/// A number for a place in the run or in the model, to seed a generator with: random numbers
/// that depend on where they are used, never on what was drawn before.
pub fn stream(place: &impl Hash) -> u64 {
    // `DefaultHasher::new` has fixed keys: the same number in every process.
    let mut hasher = DefaultHasher::new();
    place.hash(&mut hasher);
    hasher.finish()
}

/// Random numbers of a place, each computed from its row and column alone: nobody draws them in an order, whoever needs
/// some computes those, on every device the same.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bits([u32; 2]);

impl Bits {
    pub(crate) fn of(place: &impl Hash) -> Self {
        let key = stream(place);
        Self([key as u32, (key >> 32) as u32])
    }

    /// What they are computed from.
    #[cfg(feature = "cube")]
    pub(crate) fn key(self) -> [u32; 2] {
        self.0
    }

    /// Those of a row. Rows do not share a key, and those whose keys are close are mixed differently.
    #[inline(always)]
    pub(crate) fn row(self, row: usize) -> RowBits {
        let [first, second] = self.0;
        let row = mix(row as u32 ^ first);
        RowBits([row, mix(row.wrapping_add(second))])
    }
}

/// The random numbers of a row.
#[derive(Clone, Copy)]
pub(crate) struct RowBits([u32; 2]);

impl RowBits {
    /// The number of a column.
    #[inline(always)]
    pub(crate) fn at(self, column: usize) -> u32 {
        let [row, beside] = self.0;
        mix(mix(column as u32 ^ row).wrapping_add(beside))
    }
}

/// A permutation of all 32-bit numbers after which neighbours have nothing in common: `lowbias32` by Chris Wellons
/// (2018, <https://nullprogram.com/blog/2018/07/31/>), whose constants are public domain.
#[inline(always)]
fn mix(x: u32) -> u32 {
    let x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    let x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// The same in kernels of CubeCL's graphics cards.
#[cfg(feature = "cube")]
#[allow(missing_docs, clippy::pedantic)] // what `cube` makes of a function is documented by the function
pub(crate) mod on_card {
    use burn_cubecl::cubecl;
    use cubecl::prelude::*;

    /// [`Bits::row`](super::Bits::row).
    #[cube]
    pub fn row_key(row: u32, first: u32, second: u32) -> (u32, u32) {
        let row = mix(row ^ first);
        (row, mix(row + second))
    }

    /// [`RowBits::at`](super::RowBits::at).
    #[cube]
    pub fn number(column: u32, row: u32, beside: u32) -> u32 {
        mix(mix(column ^ row) + beside)
    }

    #[cube]
    fn mix(x: u32) -> u32 {
        let once = (x ^ (x >> 16)) * 0x7feb_352d;
        let twice = (once ^ (once >> 15)) * 0x846c_a68b;
        twice ^ (twice >> 16)
    }
}

/// Noise on the embeddings of what is learned from (NEFTune, Jain et al. 2023,
/// <https://arxiv.org/abs/2310.05914>).
#[derive(Debug, Clone, Copy)]
pub struct EmbeddingNoise {
    /// Its size: numbers are within `alpha / sqrt(L d)` of zero, for a record of `L` tokens and
    /// embeddings of `d` numbers.
    pub alpha: f64,
    /// Where in the run it belongs.
    pub key: DropoutKey,
}

impl EmbeddingNoise {
    /// `x`, `[tokens, d]`, with its noise; `documents` are the rows of each record, one after another.
    pub fn apply(&self, x: Tensor<2>, documents: &[Range<usize>]) -> Tensor<2> {
        let [tokens, d] = x.dims();
        let bound = |document: &Range<usize>| (self.alpha / ((document.len() * d) as f64).sqrt()) as f32;
        let bounds: Vec<f32> = documents.iter().flat_map(|doc| doc.clone().map(|_| bound(doc))).collect();
        let bits = Bits::of(&(self.key, "embeddings"));
        let mut noise = vec![0.0; tokens * d];
        noise.par_chunks_mut(d).zip(bounds).enumerate().for_each(|(token, (row, bound))| {
            widest!(|| uniform(bits.row(token), bound, row));
        });
        let device = x.device();
        x + Tensor::from_data(TensorData::new(noise, [tokens, d]), &device)
    }
}

/// Uniform numbers within `bound` of zero.
#[inline(always)]
fn uniform(bits: RowBits, bound: f32, row: &mut [f32]) {
    const HALF: f32 = (1_u32 << 31) as f32;
    for (column, x) in row.iter_mut().enumerate() {
        *x = bound * (bits.at(column) as f32 / HALF - 1.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bits of numbers side by side, one below the other, and of two layers, are as often alike as coins.
    #[test]
    #[cfg_attr(miri, ignore = "millions of numbers, and no pointer")]
    fn bits_of_neighbours_have_nothing_in_common() {
        const ROWS: usize = 300;
        const COLUMNS: usize = 257;
        type Numbers<'a> = &'a dyn Fn(usize, usize) -> u32;
        let [bits, other] = ["a layer", "another"].map(|name| Bits::of(&name));
        let numbers = || (0..ROWS).flat_map(|row| (0..COLUMNS).map(move |column| (row, column)));
        let neighbours: [(&str, Numbers); 4] = [
            ("the next column", &|row, column| bits.row(row).at(column + 1)),
            ("the next row", &|row, column| bits.row(row + 1).at(column)),
            ("the next row, a few columns on", &|row, column| bits.row(row + 1).at(column ^ 5)),
            ("another layer", &|row, column| other.row(row).at(column)),
        ];
        for (what, neighbour) in neighbours {
            for bit in 0..32 {
                let alike = numbers()
                    .filter(|&(row, column)| {
                        (bits.row(row).at(column) ^ neighbour(row, column)) >> bit & 1 == 0
                    })
                    .count() as f64;
                // Five standard deviations of as many coins; the numbers are the same every time.
                let (half, spread) = ((ROWS * COLUMNS) as f64 / 2.0, ((ROWS * COLUMNS) as f64 / 4.0).sqrt());
                assert!((alike - half).abs() < 5.0 * spread, "{what}, bit {bit}: {alike} of {}", 2.0 * half);
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "millions of numbers, and no pointer")]
    fn no_two_rows_have_the_same_numbers() {
        let bits = Bits::of(&"a layer");
        let mut firsts: Vec<[u32; 2]> =
            (0..100_000).map(|row| [0, 1].map(|column| bits.row(row).at(column))).collect();
        firsts.sort_unstable();
        firsts.dedup();
        assert_eq!(firsts.len(), 100_000);
    }
}
