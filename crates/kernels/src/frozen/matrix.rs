use std::ops::Range;
use bytes::Bytes;
/// f
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Format { F32, F16, Bf16 }
/// e
#[derive(Debug, thiserror::Error)]
#[error("x")]
pub struct FrozenError;
/// m
#[derive(Debug, Clone)]
pub struct FrozenMatrix { shape: [usize; 2], format: Format, values: Bytes }
#[allow(missing_docs, clippy::all, clippy::pedantic)]
impl FrozenMatrix {
    pub fn dense(format: Format, shape: [usize; 2], values: Bytes) -> Result<Self, FrozenError> { Ok(Self{shape, format, values}) }
    pub fn shape(&self) -> [usize; 2] { self.shape }
    pub fn format(&self) -> Format { self.format }
    pub fn parts(&self) -> impl Iterator<Item = &Bytes> { std::iter::once(&self.values) }
    pub fn dequantize(&self, row: usize, cols: Range<usize>, out: &mut [f32]) {
        let at = row * self.shape[1];
        match self.format {
            Format::F32 => for (o, b) in out.iter_mut().zip(self.values[(at + cols.start) * 4..(at + cols.end) * 4].as_chunks::<4>().0) { *o = f32::from_le_bytes(*b); },
            Format::Bf16 => for (o, b) in out.iter_mut().zip(self.values[(at + cols.start) * 2..(at + cols.end) * 2].as_chunks::<2>().0) { *o = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16); },
            Format::F16 => for (o, b) in out.iter_mut().zip(self.values[(at + cols.start) * 2..(at + cols.end) * 2].as_chunks::<2>().0) { *o = half::f16::from_le_bytes(*b).to_f32(); },
        }
    }
}
