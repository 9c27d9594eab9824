use std::fmt;
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
    /// A run folder in which another process works.
    #[error(
        "{0}: another process is at work in this run's folder; wait for its end, or give this run another run.dir"
    )]
    InUse(PathBuf),
    /// A run folder whose list of hashes cannot be trusted.
    #[error("{path}: {problem}; remove this file to go on without it")]
    Manifest {
        /// The file.
        path: PathBuf,
        /// Expected and found.
        problem: String,
    },
    /// A folder without hashes.
    #[error(
        "{0}: expected a run's folder, a checkpoint or an adapter of pronk's, with a manifest.json; found none"
    )]
    NothingToVerify(PathBuf),
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
    /// A run that is to go on with other rows than it began with.
    #[error(
        "{}: the data, the template, the tokenizer or the limits of the data have changed since this run began; put them \
         back, start a new run in another run.dir, or go on with them as they are by --accept-changes", .0.display()
    )]
    OtherRows(PathBuf),
    /// A state that could not be written, however often it was tried.
    #[error(
        "stopped at step {step}, as it cannot be saved: {source}. {kept}; when there is room again, go on with: \
         pronk train --resume {}", .run.display()
    )]
    NotSaved {
        /// Steps done.
        step: u64,
        /// The last time's error.
        source: Box<TrainError>,
        /// What is kept.
        kept: Kept,
        /// The run's folder.
        run: PathBuf,
    },
    /// A loss or a gradient that is no number any more.
    #[error(
        "step {step}: the {what} is {value}; stopped before anything of it was kept{}. {kept}. What it was computed \
         from is in {batch}. Try a lower train.learning_rate, more train.warmup_steps, or train.max_grad_norm = 1.0; \
         if the records in there are broken, mend or drop them, or set train.on_nan = \"skip\"",
         in_a_row(*.skipped)
    )]
    NotFinite {
        /// The optimizer step.
        step: u64,
        /// "loss", "gradient norm", or "adapter".
        what: &'static str,
        /// What it came to.
        value: f64,
        /// Steps that were skipped for the same reason, right before this one.
        skipped: u64,
        /// The last good state.
        kept: Kept,
        /// The file with the rows, or why there is none.
        batch: String,
    },
    /// An adapter that is not what was trained once it is loaded again.
    #[error(
        "{}: the adapter was saved, and gives a loss of {found} where it gave {expected} before; do not use it. {kept}:          see that disk and memory are sound, and go on from there", .path.display()
    )]
    ReadsBackOtherwise {
        /// The adapter's folder.
        path: PathBuf,
        /// The mean loss over the rows that were looked at, before it was saved.
        expected: f64,
        /// And afterwards.
        found: f64,
        /// What is kept.
        kept: Kept,
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
    /// The same in the middle of a run.
    #[error(
        "step {step}: the device failed: {problem}. {kept}. What was computed is in {batch}. See that the device is there \
         (pronk devices) and that nothing else takes its memory, then go on with: pronk train --resume {}; where it was \
         out of memory, set a smaller train.memory_budget or train.micro_batch_size", .run.display()
    )]
    DeviceFailed {
        /// The optimizer step.
        step: u64,
        /// What was told of it.
        problem: String,
        /// The last good state.
        kept: Kept,
        /// The file with the rows, or why there is none.
        batch: String,
        /// The run's folder.
        run: PathBuf,
    },
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

/// The newest state that a run can go on from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept(pub Option<PathBuf>);

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(path) => write!(f, "The last good state is {}", path.display()),
            None => write!(
                f,
                "The last good state is the one before the first step: no checkpoint was written yet"
            ),
        }
    }
}

fn in_a_row(skipped: u64) -> String {
    if skipped == 0 { String::new() } else { format!(", after {skipped} steps in a row that were skipped") }
}

impl TrainError {
    /// Whether it names something in the run's folder that has to stay there for the user.
    pub fn refers_to_the_run(&self) -> bool {
        matches!(self, Self::NotFinite { .. } | Self::DeviceFailed { .. } | Self::NotSaved { .. })
    }

    /// Whether the system refused to read or write: what may go well another time.
    pub(crate) fn is_io(&self) -> bool {
        matches!(
            self,
            Self::Io { .. }
                | Self::Data(DataError::Io { .. })
                | Self::Lora(LoraError::Io { .. })
                | Self::Model(ModelError::Io { .. })
        )
    }

    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}
