//! Losses and gradients that are no numbers, and devices that fail: what is told of them, and whether the run goes on.

use pronk_lora::LoraError;
use serde_json::{Value, json};

use super::{Observer, Trainer};
use crate::{OnNan, TrainError};

/// More skipped steps in a row than this are no accident of the data.
const MAX_SKIPPED_IN_A_ROW: u64 = 10;
/// The rows that the last such step learned from, in the run's folder.
const BATCH: &str = "not_finite.json";

impl Trainer<'_> {
    /// How many steps have been skipped with the one that has just been computed; `None` where it is sound. An error
    /// where the run has to stop.
    pub(super) fn skipped(
        &mut self,
        loss: f64,
        grad_norm: f64,
        observer: &mut dyn Observer,
    ) -> Result<Option<u64>, TrainError> {
        let found = [("loss", loss), ("gradient norm", grad_norm)];
        let Some((what, value)) = found.into_iter().find(|(_, value)| !value.is_finite()) else {
            self.state.skipped_in_a_row = 0;
            return Ok(None);
        };
        let (step, in_a_row) = (self.state.step + 1, self.state.skipped_in_a_row);
        let batch = self.write_batch(step, what, &value.to_string(), &self.plan.rows(step - 1));
        if self.config.on_nan == OnNan::Stop || in_a_row == MAX_SKIPPED_IN_A_ROW {
            self.save_before_it_ends();
            return Err(TrainError::NotFinite {
                step,
                what,
                value,
                skipped: in_a_row,
                kept: self.kept(),
                batch,
            });
        }
        (self.state.skipped, self.state.skipped_in_a_row) = (self.state.skipped + 1, in_a_row + 1);
        observer.warn(&format!("step {step} is skipped: its {what} is {value}; its rows are in {batch}"));
        Ok(Some(self.state.skipped))
    }

    /// The same for the micro-batch of the rehearsal, which no step learns from.
    pub(super) fn rehearsed_not_finite(
        &mut self,
        value: f64,
        observer: &mut dyn Observer,
    ) -> Result<(), TrainError> {
        let what = "loss";
        let rows = self.plan.rows_of_the_largest(&self.data.train, self.micro_batches);
        let batch = self.write_batch(1, what, &value.to_string(), &rows);
        if self.config.on_nan == OnNan::Stop {
            return Err(TrainError::NotFinite { step: 1, what, value, skipped: 0, kept: self.kept(), batch });
        }
        observer.warn(&format!("the loss of the longest micro-batch is {value}; its rows are in {batch}"));
        Ok(())
    }

    /// What ended the run, with what is kept of it where that is news: a device that failed, or an update that no number
    /// holds, which is found when it is to be saved.
    pub(super) fn ended_by(&mut self, error: TrainError) -> TrainError {
        let (computing, done) = (self.state.step + 1, self.state.step);
        match error {
            TrainError::Device(problem) => {
                let step = computing.min(self.plan.total_steps);
                let batch = self.write_batch(step, "device", &problem, &self.plan.rows(step - 1));
                let (kept, run) = (self.kept(), self.folder.root().into());
                TrainError::DeviceFailed { step, problem, kept, batch, run }
            }
            TrainError::Lora(LoraError::NotFinite { .. }) if done > 0 => {
                let (step, what, value) = (done, "adapter", f64::NAN);
                let batch = self.write_batch(step, what, &value.to_string(), &self.plan.rows(step - 1));
                TrainError::NotFinite { step, what, value, skipped: 0, kept: self.kept(), batch }
            }
            other => other,
        }
    }

    /// Writes what a step learned from, as tokens and as text. Returns where it is, or why it is not.
    fn write_batch(&self, step: u64, what: &str, value: &str, rows: &[usize]) -> String {
        let row = |index: usize| {
            let row = self.data.train.get(index)?;
            Some(json!({
                "row": index,
                "text": self.tokenizer.decode_with_specials(row.token_ids).unwrap_or_default(),
                "token_ids": row.token_ids,
                "loss_mask": row.loss_mask,
            }))
        };
        let rows: Vec<Value> = rows.iter().copied().filter_map(row).collect();
        // As text: JSON has no NaN.
        let batch = json!({"step": step, "what": what, "value": value, "rows": rows});
        match self.folder.replace(BATCH, format!("{batch:#}\n").as_bytes()) {
            Ok(()) => self.folder.root().join(BATCH).display().to_string(),
            Err(e) => format!("no file ({e})"),
        }
    }
}
