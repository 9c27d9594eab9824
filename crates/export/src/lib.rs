//! An adapter merged into its base: a model that needs no adapter any more, in the base's own
//! files, names and formats.
//!
//! [`merge()`] holds one tensor at a time. It writes beside its destination and moves the whole
//! directory into place once [`verify()`] has found that the merged model answers as the base and
//! the adapter do; whatever goes wrong before that leaves nothing behind.

mod config_json;
mod directory;
mod dtype;
mod error;
mod merge;
mod update;
mod verify;

pub use dtype::Dtype;
pub use error::ExportError;
pub use merge::{Finish, MergeOptions, MergeReport, merge};
pub use verify::{Verification, verify};
