use std::path::{Path, PathBuf};

use bytesize::ByteSize;
use pronk_data::DataError;
use pronk_lora::LoraError;
use pronk_model::ModelError;

/// What can go wrong while training.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A knob of the recipe's `[train]` table.
    #[error("train.{knob}: expected {expected}, found {found}")]
    Config {
        /// The knob.
        knob: &'static str,
        /// What it takes.
        expected: &'static str,
        /// What it was given.
        found: String,
    },
    /// Nothing to train on.
    #[error("no rows to train on: every record was dropped or held out; see the data's summary")]
    NoRows,
    /// A file of the run folder that cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A run folder that already holds a run.
    #[error(
        "{0}: holds a run already; go on with it by `pronk train --resume {0}`, or give this run another run.dir"
    )]
    RunExists(PathBuf),
    /// A run folder without a checkpoint to go on from.
    #[error(
        "{0}: no whole checkpoint to go on from; start the run again in another run.dir, or remove this folder first"
    )]
    NoCheckpoint(PathBuf),
    /// A checkpoint that does not belong to this run, or is damaged.
    #[error("{path}: {problem}")]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// Expected and found.
        problem: String,
    },
    /// A loss or a gradient that is no number any more.
    #[error(
        "step {step}: the {what} is {value}; stopped before it reached the adapter. The last good state is {kept}. \
         Try a lower train.learning_rate, more train.warmup_steps, or train.max_grad_norm = 1.0"
    )]
    NotFinite {
        /// The optimizer step.
        step: u64,
        /// "loss" or "gradient norm".
        what: &'static str,
        /// What it came to.
        value: f64,
        /// Where the last good state is.
        kept: String,
    },
    /// A budget that not even the smallest share of a run fits in.
    #[error(
        "train.memory_budget: {} is too small: a micro-batch of {tokens} tokens takes at least {}. Expected \
         that much, or a smaller train.micro_batch_size or data.max_seq_len, base.weights = \"streamed\", or \
         base.quantize = \"nf4\"",
        .budget.display().si(), .least.display().si()
    )]
    Budget {
        /// What there is.
        budget: ByteSize,
        /// Tokens of the largest micro-batch.
        tokens: usize,
        /// What would do.
        least: ByteSize,
    },
    /// Numbers that could not be read back from the device.
    #[error("the device failed while reading results back: {0}")]
    Device(String),
    /// From the data.
    #[error(transparent)]
    Data(#[from] DataError),
    /// From the adapter.
    #[error(transparent)]
    Lora(#[from] LoraError),
    /// From the base.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl TrainError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}
