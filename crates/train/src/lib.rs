//! The training loop: from prepared rows to a tuned adapter in a run folder.
//!
//! [`Trainer`] is the loop; [`loss_and_gradients`] carries one micro-batch forwards
//! and backwards, block by block. Where a step's rows, its learning rate and its dropout come
//! from depends on the step's number alone, so a run that goes on from a checkpoint is the same run.

mod backprop;
mod card;
mod checkpoint;
mod config;
mod error;
mod footprint;
mod gradients;
mod manifest;
mod memory;
mod memory_plan;
mod metrics;
mod optimizer;
mod plan;
mod publish;
mod run_folder;
mod samples;
mod saved_inputs;
mod schedule;
mod spans;
mod trainer;
mod verify;

pub use backprop::{Keep, MicroBatchLoss, loss_and_gradients, loss_only};
pub use card::ModelCard;
pub use checkpoint::{Best, Checkpoint, TrainerState};
pub use config::{OnNan, Recompute, TrainConfig};
pub use error::{Kept, TrainError};
pub use footprint::{Footprint, Shapes, Workload};
pub use gradients::Gradients;
pub use manifest::{Difference, MANIFEST, sha256_of, sha256_of_file};
pub use memory::{available_memory_bytes, peak_memory_bytes};
pub use memory_plan::MemoryPlan;
pub use metrics::{EvalRecord, StepRecord};
pub use optimizer::{Optimizer, OptimizerKind};
pub use plan::Plan;
pub use run_folder::RunFolder;
pub use samples::{SamplePrompt, SampleRound, Samples};
pub use saved_inputs::SavedInputs;
pub use schedule::{Schedule, learning_rate};
pub use trainer::{Ending, Observer, Summary, Trainer};
pub use verify::{Verified, seal, verify};
