//! The frozen base: reading it, and running it.
//!
//! A [`Base`] is what lies on the disk: a Hugging Face directory or a GGUF file, opened and
//! checked against its own configuration. A [`Decoder`] is that base on a device: an embedding,
//! blocks, a norm, a head. Blocks are plain values with a plain `forward`, so that training can
//! run them one at a time, forwards and backwards.

mod base;
mod block;
mod config;
mod decoder;
mod error;
mod generate;
mod gguf;
mod host_tensor;
mod mapped;
mod safetensors_files;

pub use base::{Base, Shard};
pub use block::{Block, LayerCache, Layout};
pub use config::DecoderConfig;
pub use decoder::{Decoder, streamed_logits};
pub use error::ModelError;
pub use generate::{Sampling, generate};
pub use gguf::GgufFile;
pub use host_tensor::HostTensor;
