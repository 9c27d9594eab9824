//! The frozen base: reading it, running it, and writing one.
//!
//! A [`Base`] is what lies on the disk: a Hugging Face directory or a GGUF file, opened and
//! checked against its own configuration. A [`Decoder`] is that base on a device: an embedding,
//! blocks, a norm, a head. Blocks are plain values with a plain `forward`, so that training can
//! run them one at a time, forwards and backwards. [`quantized()`] keeps a base in fewer bits. A
//! [`CheckpointWriter`] writes a new one, which [`synthesize`] fills with random weights.

mod base;
mod bitsandbytes;
mod block;
mod calibration;
mod checkpoint_writer;
mod config;
mod decoder;
mod error;
mod family;
mod fingerprint;
mod generate;
mod gguf;
mod host_tensor;
mod layout;
mod loader;
mod mapped;
mod projections;
mod pytorch_file;
mod quantize;
mod safetensors_files;
mod staging;
mod start;
mod synth;
mod weights_writer;
mod whole;

pub use base::{Base, Shard};
pub use block::{Block, LayerCache};
pub use checkpoint_writer::CheckpointWriter;
pub use config::{DecoderConfig, EMBEDDINGS, HEAD, SlidingWindow, Windowed};
pub use decoder::{Decoder, Visit};
pub use error::ModelError;
pub use family::Family;
pub use generate::{Answer, Ending, KeyValueCache, Sampling, answer, generate};
pub use gguf::{GgufAdapter, GgufFile, GgufPair, GgufTensor, GgufWriter, Value as GgufValue};
pub use host_tensor::HostTensor;
pub use layout::Layout;
pub use loader::{LoadConfig, Memory, Residency, WeightBytes};
pub use quantize::{Origin, Quantization, QuantizedBase, Scheme, quantized};
pub use staging::Staging;
pub use start::{CALIBRATION, StartWeights, start_bytes};
pub use synth::{SHAPES, Shape, synthesize};
pub use weights_writer::{ShardSpec, TensorSpec, WeightsWriter, WrittenWeights};
