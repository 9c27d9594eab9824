//! The few tensor operations that decide how fast and how large a tuning run is.
//!
//! Activations are two-dimensional, `[tokens, features]`: the records of a batch lie one after
//! another, so nothing is ever padded. Only [`attention()`] needs to know where a record begins.
//!
//! Everything can be written in burn's own operations, which every backend has and which burn's
//! autodiff differentiates; [`plain`] is what other implementations are compared with. Where a
//! profile shows the time, an operation has an implementation of its own, with its own backward pass: on the processor
//! a loop over the tensors' numbers, on CubeCL's graphics cards a kernel (`card.rs` beside each).

// burn deprecates its LibTorch backend after 0.22; here it stays.
#![cfg_attr(feature = "tch", allow(deprecated))]

mod adamw;
mod attention;
mod bf16;
mod blockwise;
mod cache_line;
#[cfg(feature = "cube")]
mod card;
mod cross_entropy;
mod device;
mod direction;
mod dot;
mod dropout;
mod exp;
mod frozen;
mod glu;
mod heap;
// Without a backend on the processor nobody lends anything.
#[cfg_attr(not(any(feature = "flex", feature = "tch")), allow(dead_code))]
mod host;
mod linear;
mod lion;
mod low_rank;
mod muon;
mod norm;
mod outputs;
pub mod plain;
mod product;
mod pullback;
mod random;
mod residual;
#[cfg_attr(not(any(feature = "flex", feature = "tch")), allow(dead_code))]
mod rewritten;
mod rotary;
mod scratch;
mod soft_cap;
mod softmax;
mod threads;

pub use adamw::{AdamW, AdamWState};
pub use attention::{Scoring, Span, attention, attention_bytes_on_card};
pub use blockwise::Blockwise;
pub use cross_entropy::{CrossEntropy, LossGradients, cross_entropy, logit_rows};
pub use device::{DEVICE_NAMES, DeviceError, available_devices, computes_on_host, open_device, open_devices};
pub use dot::dot;
pub use dropout::{Dropout, DropoutKey, Mask};
pub use frozen::{
    DYNAMIC_MAP, Format, FrozenError, FrozenMatrix, FrozenProduct, FrozenWeight, NF4_CODEBOOK, Nf4Parts,
    Nf4QuantState, Nf4Scales, Precision, Update, dense_bytes_on_card, quantize_int8, quantize_nf4,
};
pub use glu::{Activation, glu};
pub use heap::{Heap, keep_freed_memory, take_memory};
pub use linear::FrozenLinear;
pub use lion::Lion;
pub use low_rank::{Scaling, add_low_rank};
pub use muon::Muon;
pub use norm::{rms_norm, rms_norm_beside};
pub use pullback::{Tracked, pull_back};
pub use random::{EmbeddingNoise, stream};
pub use residual::residual;
pub use rotary::{RopeScaling, Rotary, RotaryTables};
pub use soft_cap::soft_cap;
pub use threads::compute_on_this_thread;

/// Whole numbers from -4 to 4, whose products and sums are exact in every precision.
#[cfg(test)]
fn small_numbers(count: usize, seed: usize) -> Vec<f32> {
    (seed..seed + count).map(|i| ((i * 7 + i / 5) % 9) as f32 - 4.0).collect()
}
