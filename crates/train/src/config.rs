use bytesize::ByteSize;
use serde::de::{self, Unexpected};
use serde::{Deserialize, Deserializer, Serialize};

use crate::{OptimizerKind, SavedInputs, Schedule, TrainError};

/// The recipe's `[train]` table. Zero switches off what a "0: " note says it does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Passes over the rows; fractions are allowed. `max_steps`, where set, goes before it.
    pub epochs: f64,
    /// Optimizer steps in all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u64>,
    /// Records an optimizer step learns from.
    pub batch_size: usize,
    /// Rows that go through the base together. Smaller takes less memory, and changes nothing else.
    /// Left out: as many as the memory holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch_size: Option<usize>,
    /// "adamw", "adamw8bit", "lion" or "muon".
    pub optimizer: OptimizerKind,
    /// The learning rate after the warmup.
    pub learning_rate: f64,
    /// `LoRA+`: how many times faster B learns than A.
    pub lora_plus_ratio: f64,
    /// What becomes of it: "cosine" and "linear" fall to zero at the last step.
    pub schedule: Schedule,
    /// Steps over which it rises from zero.
    pub warmup_steps: u64,
    /// Share of the learning rate that every weight shrinks by.
    pub weight_decay: f64,
    /// NEFTune: noise on the embeddings of what is learned from. 0: none.
    pub neftune_noise_alpha: f64,
    /// Gradients whose norm is above it are scaled down to it. 0: never.
    pub max_grad_norm: f64,
    /// Evaluate on the held-out rows every so many steps, before the first and after the last. 0: never.
    pub eval_steps: u64,
    /// Write a checkpoint every so many steps. 0: never, not even after the last.
    pub save_steps: u64,
    /// Checkpoints to keep.
    pub keep_last: usize,
    /// Checkpoints to keep beside them: those with the lowest eval loss, of those saved where it was measured.
    pub keep_best: usize,
    /// How long to wait and try again when a save fails, in seconds. 0: not at all.
    pub save_patience: u64,
    /// What to do when a loss or its gradients are no numbers: "stop", or "skip" the step.
    pub on_nan: OnNan,
    /// "blocks" runs each block again for its gradients and keeps only its input: far less
    /// memory for about a third more time. "none" keeps everything. "auto" keeps as much as
    /// `memory_budget` allows.
    pub recompute: Recompute,
    /// How the inputs of blocks that run again are kept: "f32", "bf16", or in the "host"'s memory.
    pub saved_inputs: SavedInputs,
    /// What the run may take of the memory it computes in, such as "8GB". Left out: most of what is
    /// free when it starts.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "size")]
    pub memory_budget: Option<ByteSize>,
    /// Seeds the order of the rows, the adapter's first values, and dropout.
    pub seed: u64,
}

/// What is kept from the forward pass for the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// The graphs of as many blocks as fit, and the other blocks' inputs.
    Auto,
    /// Every block's graph.
    None,
    /// Every block's input.
    Blocks,
}

/// `train.on_nan`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnNan {
    /// End the run before the adapter is touched.
    Stop,
    /// Leave the adapter as it is and go on with the next step; many in a row end the run.
    Skip,
}

/// A size in words that [`ByteSize`] knows, or in bytes.
fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<ByteSize>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a size such as \"8GB\"")]
    enum Given {
        Bytes(u64),
        Words(String),
    }
    match Given::deserialize(deserializer)? {
        Given::Bytes(bytes) => Ok(Some(ByteSize(bytes))),
        Given::Words(words) => match words.parse() {
            Ok(size) => Ok(Some(size)),
            Err(_) => Err(de::Error::invalid_value(Unexpected::Str(&words), &"a size such as \"8GB\"")),
        },
    }
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            epochs: 3.0,
            max_steps: None,
            batch_size: 16,
            micro_batch_size: None,
            optimizer: OptimizerKind::default(),
            learning_rate: 3e-4,
            lora_plus_ratio: 1.0,
            schedule: Schedule::Cosine,
            warmup_steps: 10,
            weight_decay: 0.0,
            neftune_noise_alpha: 0.0,
            max_grad_norm: 1.0,
            eval_steps: 50,
            save_steps: 50,
            keep_last: 2,
            keep_best: 0,
            save_patience: 600,
            on_nan: OnNan::Stop,
            recompute: Recompute::Auto,
            saved_inputs: SavedInputs::default(),
            memory_budget: None,
            seed: 42,
        }
    }
}

impl TrainConfig {
    /// Refuses values that cannot train; all of them at once.
    pub fn problems(&self) -> Vec<TrainError> {
        let positive = |n: f64| n.is_finite() && n > 0.0;
        let not_negative = |n: f64| n.is_finite() && n >= 0.0;
        let checks = [
            (positive(self.epochs), "epochs", "a number above 0", self.epochs.to_string()),
            (self.max_steps != Some(0), "max_steps", "a whole number from 1", "0".into()),
            (self.batch_size > 0, "batch_size", "a whole number from 1", "0".into()),
            (self.micro_batch_size != Some(0), "micro_batch_size", "a whole number from 1", "0".into()),
            (self.keep_last > 0, "keep_last", "a whole number from 1", "0".into()),
            (
                positive(self.learning_rate),
                "learning_rate",
                "a number above 0",
                self.learning_rate.to_string(),
            ),
            (
                positive(self.lora_plus_ratio),
                "lora_plus_ratio",
                "a number above 0",
                self.lora_plus_ratio.to_string(),
            ),
            (
                not_negative(self.neftune_noise_alpha),
                "neftune_noise_alpha",
                "a number from 0",
                self.neftune_noise_alpha.to_string(),
            ),
            (
                not_negative(self.weight_decay),
                "weight_decay",
                "a number from 0",
                self.weight_decay.to_string(),
            ),
            (
                not_negative(self.max_grad_norm),
                "max_grad_norm",
                "a number from 0",
                self.max_grad_norm.to_string(),
            ),
        ];
        checks
            .into_iter()
            .filter(|(ok, ..)| !ok)
            .map(|(_, knob, expected, found)| TrainError::Config { knob, expected, found })
            .collect()
    }
}
