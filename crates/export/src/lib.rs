//! An adapter for others: merged into its base, as a model that needs no adapter any more, or in the layout of
//! another runtime.
//!
//! [`export()`] writes what PEFT, llama.cpp, mlx-lm, Ollama, vLLM and mistral.rs load, each a [`Runtime`].
//! [`merge()`] holds one tensor at a time. It writes beside its destination and moves the whole
//! directory into place once [`verify()`] has found that the merged model answers as the base and
//! the adapter do; whatever goes wrong before that leaves nothing behind.

mod adapter;
mod config_json;
mod directory;
mod dtype;
mod error;
mod merge;
mod runtime;
mod update;
mod verify;

pub use adapter::{ExportOptions, ExportReport, export};
pub use dtype::Dtype;
pub use error::ExportError;
pub use merge::{Finish, MergeOptions, MergeReport, merge};
pub use runtime::Runtime;
pub use verify::{Verification, verify};
