//! The few tensor operations that decide how fast and how large a tuning run is.
//!
//! Activations are two-dimensional, `[tokens, features]`: the records of a batch lie one after
//! another, so nothing is ever padded. Only [`attention()`] needs to know where a record begins.
//!
//! Everything can be written in burn's own operations, which every backend has and which burn's
//! autodiff differentiates; [`plain`] is what other implementations are compared with. Where a
//! profile shows the time, an operation has an implementation of its own: on the processor, a loop
//! over the tensors' numbers, with its own backward pass.

// burn deprecates its LibTorch backend after 0.22; here it stays.
#![cfg_attr(feature = "tch", allow(deprecated))]

mod adamw;
mod attention;
mod cross_entropy;
mod device;
mod direction;
mod dot;
mod exp;
mod frozen;
// Without a backend on the processor nobody lends anything.
#[cfg_attr(not(any(feature = "flex", feature = "tch")), allow(dead_code))]
mod host;
mod linear;
mod norm;
pub mod plain;
mod pullback;
mod random;
#[cfg_attr(not(any(feature = "flex", feature = "tch")), allow(dead_code))]
mod rewritten;
mod rotary;
mod swiglu;

pub use adamw::{AdamW, AdamWState};
pub use attention::{Span, attention};
pub use cross_entropy::{CrossEntropy, cross_entropy, logit_rows};
pub use device::{DEVICE_NAMES, DeviceError, available_devices, computes_on_host, open_device};
pub use frozen::{
    DYNAMIC_MAP, Format, FrozenError, FrozenMatrix, FrozenProduct, NF4_CODEBOOK, Nf4Parts, Nf4QuantState,
    Nf4Scales, Precision, quantize_int8, quantize_nf4,
};
pub use linear::FrozenLinear;
pub use norm::rms_norm;
pub use pullback::{Tracked, pull_back};
pub use random::{Dropout, DropoutKey, stream};
pub use rotary::{RopeScaling, Rotary, RotaryTables};
pub use swiglu::swiglu;
