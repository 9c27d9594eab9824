//! An adapter for others: merged into its base, as a model that needs no adapter any more, or in the layout of
//! another runtime.
//!
//! [`export()`] writes what PEFT, llama.cpp, mlx-lm, Ollama, vLLM and mistral.rs load, each a [`Runtime`].
//! [`merge_gguf()`] writes a merged model for llama.cpp. [`merge()`] holds one tensor at a time. It writes beside its destination and moves the whole
//! directory into place once [`verify()`] has found that the merged model answers as the base and
//! the adapter do; whatever goes wrong before that leaves nothing behind.

mod adapter;
mod config_json;
mod directory;
mod dtype;
mod error;
mod extract;
mod gguf_merge;
mod gguf_type;
mod merge;
mod runtime;
mod update;
mod verify;

pub use adapter::{ExportOptions, ExportReport, export};
pub use dtype::Dtype;
pub use error::ExportError;
pub use extract::{ExtractedLayer, Extraction, extract};
pub use gguf_merge::{GgufMergeOptions, MODEL_GGUF, merge_gguf};
pub use gguf_type::GgufType;
pub use merge::{Finish, MergeOptions, MergeReport, merge};
pub use runtime::Runtime;
pub use verify::{Verification, measure, verify};
