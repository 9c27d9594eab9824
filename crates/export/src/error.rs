use std::io;
use std::path::{Path, PathBuf};

use pronk_lora::LoraError;
use pronk_model::ModelError;

use crate::Runtime;

/// What can go wrong with a merge or an export. Nothing of what was to be written is left behind then.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// A base, or a merged model, that cannot be read, or a destination that cannot be written to.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// An adapter that cannot be read or written.
    #[error(transparent)]
    Lora(#[from] LoraError),
    /// A file or a directory that cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A format that does not exist.
    #[error("dtype: expected f32, f16 or bf16, found '{found}'")]
    UnknownDtype {
        /// What was asked for.
        found: String,
    },
    /// A type of GGUF files that is not written.
    #[error("expected f32, f16, bf16, q8_0, q4_0 or q4_k, found '{found}'")]
    UnknownGgufType {
        /// What was asked for.
        found: String,
    },
    /// A base that no GGUF file can hold; all the reasons at once.
    #[error("{base}: this base cannot be written as a GGUF file:\n  {}", .problems.join("\n  "))]
    NoGguf {
        /// The base.
        base: PathBuf,
        /// Each with what was found.
        problems: Vec<String>,
    },
    /// A runtime that is not known.
    #[error("expected peft, gguf, mlx, ollama, vllm or mistralrs, found '{found}'")]
    UnknownRuntime {
        /// What was asked for.
        found: String,
    },
    /// An adapter that a runtime cannot load; all the reasons at once.
    #[error("{runtime} cannot load this adapter:\n  {}", .problems.join("\n  "))]
    Refused {
        /// The runtime.
        runtime: Runtime,
        /// Each with what to do.
        problems: Vec<String>,
    },
    /// An adapter that is the base again, under another name.
    #[error("every B of this adapter is zero, so that it changes nothing: train it first")]
    ChangesNothing,
    /// An adapter that was trained on another base; all the reasons at once.
    #[error("this adapter does not fit the base {base}:\n  {}", .problems.join("\n  "))]
    DoesNotFit {
        /// The base.
        base: PathBuf,
        /// Each with the module, expected and found.
        problems: Vec<String>,
    },
    /// A number that the chosen format cannot hold, or that is none.
    #[error("{tensor}: expected finite {dtype} numbers, found {found}; {remedy}")]
    Number {
        /// The tensor.
        tensor: String,
        /// The format's name.
        dtype: &'static str,
        /// The first such number.
        found: f32,
        /// What to do.
        remedy: &'static str,
    },
    /// A file that is not what its name says, or a tensor that cannot be written as one.
    #[error("{path}: {problem}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Expected and found.
        problem: String,
    },
    /// What the caller adds to the files failed.
    #[error("what was written could not be completed: {0}")]
    Finish(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Tokens that the models cannot be compared on.
    #[error("the tokens to verify with: {problem}")]
    Prompt {
        /// Expected and found.
        problem: String,
    },
    /// What was written answers unlike base and adapter.
    #[error("{what} does not answer as base and adapter do: {problem}")]
    Unfaithful {
        /// The merged model, or the exported adapter.
        what: &'static str,
        /// What was compared, expected and found, and what to do.
        problem: String,
    },
}

impl ExportError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}
