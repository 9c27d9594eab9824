use serde::{Deserialize, Deserializer, Serialize};

/// A line of `metrics.jsonl`: one optimizer step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Steps done, this one included.
    pub step: u64,
    /// Passes over the rows done.
    pub epoch: f64,
    /// Mean loss over the step's supervised tokens, before the step was taken. JSON has no NaN: null.
    #[serde(deserialize_with = "number_or_null")]
    pub loss: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Norm of the gradients, before clipping. JSON has no NaN: null.
    #[serde(deserialize_with = "number_or_null")]
    pub grad_norm: f64,
    /// Tokens that went through the base; nothing is ever padded.
    pub tokens: usize,
    /// Tokens that were learned from.
    pub supervised_tokens: usize,
    /// `tokens / seconds`.
    pub tokens_per_s: f64,
    /// Seconds from the step's rows to the updated adapter.
    pub seconds: f64,
    /// Largest resident memory of the process so far.
    pub peak_memory_bytes: Option<u64>,
    /// Mean loss over the held-out rows' supervised tokens, where it was measured after this step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
    /// On a step that was left out, as its loss or its gradients were no numbers: how many have been so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<u64>,
}

fn number_or_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// The line of `metrics.jsonl` before the first step: the base, measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// 0.
    pub step: u64,
    /// 0.
    pub epoch: f64,
    /// Mean loss over the held-out rows' supervised tokens.
    pub eval_loss: f64,
}
