use std::path::{Path, PathBuf};

/// What can go wrong with a base.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file or a directory that cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A path that holds no base.
    #[error("{path}: {problem}")]
    NoBase {
        /// The path.
        path: PathBuf,
        /// What is missing, and what would do.
        problem: String,
    },
    /// A file that is not what its name says.
    #[error("{path}: {problem}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Expected and found.
        problem: String,
    },
    /// A configuration that this decoder does not compute; every reason at once.
    #[error("{path}: this base needs what is not supported:\n  {}", .problems.join("\n  "))]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// Each with its key, the value found, and what is supported.
        problems: Vec<String>,
    },
    /// Weights that do not match the configuration; all of them at once.
    #[error("{path}: the weights do not match the configuration:\n  {}", listed(.problems))]
    Weights {
        /// The base.
        path: PathBuf,
        /// Each with the tensor's name, expected and found.
        problems: Vec<String>,
    },
    /// A destination that must not be written to.
    #[error("{path}: cannot write to this directory: {problem}")]
    Destination {
        /// The destination.
        path: PathBuf,
        /// What was expected, what was found, and what to do.
        problem: String,
    },
    /// A shape that is not in [`SHAPES`](crate::SHAPES).
    #[error("no published shape is called '{found}'{meant}\n  there are: {known}")]
    UnknownShape {
        /// What was asked for.
        found: String,
        /// The name that was probably meant, as a question, or nothing.
        meant: String,
        /// The names there are.
        known: String,
    },
    /// A scheme to quantize to that there is not.
    #[error("quantize: expected {known}, found '{found}'")]
    UnknownScheme {
        /// What was asked for.
        found: String,
        /// The schemes there are.
        known: String,
    },
    /// A layer to be left in 16 bits that there is not.
    #[error(
        "skip_modules: expected names of the base's linear layers, or what they begin or end with, found '{found}'\n  \
         such as: {known}"
    )]
    UnknownModule {
        /// What was asked for.
        found: String,
        /// The short names there are.
        known: String,
    },
    /// A base to quantize that is quantized already.
    #[error(
        "{path}: expected weights of 16 or 32 bits to quantize to {wanted}, found {found}; a quantized base is used as \
         it is: leave quantize out"
    )]
    AlreadyQuantized {
        /// The base.
        path: PathBuf,
        /// The formats it is quantized in.
        found: String,
        /// What it was to be quantized to.
        wanted: String,
    },
    /// An adapter that this base cannot have.
    #[error(transparent)]
    Lora(#[from] pronk_lora::LoraError),
    /// The caller has asked to stop.
    #[error("stopped; nothing is left behind")]
    Interrupted,
    /// Numbers that could not be read back from the device.
    #[error("the device failed while reading results back: {0}")]
    Device(String),
}

impl ModelError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }

    pub(crate) fn malformed(path: &Path, problem: impl Into<String>) -> Self {
        Self::Malformed { path: path.into(), problem: problem.into() }
    }
}

/// The first twenty, and how many more there are.
fn listed(problems: &[String]) -> String {
    const SHOWN: usize = 20;
    let mut lines: Vec<String> = problems.iter().take(SHOWN).cloned().collect();
    if problems.len() > SHOWN {
        lines.push(format!("... and {} more", problems.len() - SHOWN));
    }
    lines.join("\n  ")
}
