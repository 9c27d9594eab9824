//! Matrices of the frozen base in host memory, and products with them.

mod bf16_tiles;
mod matrix;
mod operation;
mod product;

pub use matrix::{Format, FrozenError, FrozenMatrix};
pub use operation::FrozenProduct;
pub(crate) use operation::{Direction, frozen_product};
pub use product::Precision;
