use std::path::PathBuf;

/// What can go wrong with adapters.
#[derive(Debug, thiserror::Error)]
pub enum LoraError {
    /// A knob of the recipe's `[lora]` table.
    #[error("lora.{knob}: expected {expected}, found {found}")]
    Config {
        /// The knob.
        knob: &'static str,
        /// What it takes.
        expected: String,
        /// What it was given.
        found: String,
    },
    /// A target that matches no linear layer.
    #[error(
        "lora.target_modules: [{targets}] matches no linear layer of this base; there are: {available}, or the word \"all-linear\""
    )]
    NoSuchTarget {
        /// The targets without a match.
        targets: String,
        /// The names that exist.
        available: String,
    },
    /// A file that cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that is not what its name says.
    #[error("{path}: {problem}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Expected and found.
        problem: String,
    },
    /// An adapter that this base, or this program, cannot carry; all the reasons at once.
    #[error("{path}: this adapter does not fit:\n  {}", .problems.join("\n  "))]
    DoesNotFit {
        /// The adapter's directory.
        path: PathBuf,
        /// Each with tensor name, expected and found.
        problems: Vec<String>,
    },
    /// Adapters that do not become one.
    #[error("these adapters cannot be combined: {problem}")]
    Combine {
        /// Expected and found.
        problem: String,
    },
    /// An adapter that holds something else than numbers.
    #[error("{path}: the adapter was not saved: it holds numbers that are not finite")]
    NotFinite {
        /// The file.
        path: PathBuf,
    },
    /// An adapter not worth saving, or one that came back different from the disk.
    #[error("{path}: the adapter was not saved: {problem}")]
    NotSaved {
        /// The file.
        path: PathBuf,
        /// Why.
        problem: String,
    },
}
