//! Matrices of the frozen base in host memory, in the format their file keeps them in, and
//! products with them. A base stays as small as its file; only the tile in use is ever spelled out.

// Loops have to end up inside the functions of `wide` that are compiled for wider vectors.
#![allow(clippy::inline_always)]

#[cfg(feature = "cube")]
mod cube;
mod dense;
mod feed_forward;
mod format;
mod ggml;
mod int8;
mod layers;
mod matrix;
mod nf4;
mod nf4_quantize;
mod operation;
mod output;
mod product;
mod product_bf16;
mod product_feed_forward;
mod weight;
pub(crate) mod wide;

pub(crate) use feed_forward::feed_forward;
pub use format::{Format, FrozenError};
pub use int8::quantize_int8;
pub use layers::Update;
pub(crate) use layers::{Layer, frozen_layers};
pub use matrix::FrozenMatrix;
pub use nf4::{DYNAMIC_MAP, NF4_CODEBOOK, Nf4Parts, Nf4QuantState, Nf4Scales};
pub use nf4_quantize::quantize_nf4;
pub use operation::FrozenProduct;
pub(crate) use operation::{frozen_product, unread_product};
pub use product::Precision;
pub use weight::{FrozenWeight, dense_bytes_on_card};
