//! What a run keeps, and what it does when the disk does not take it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tracing::trace_span;

use super::{Observer, Trainer};
use crate::error::Kept;
use crate::manifest::differences;
use crate::publish::publish;
use crate::{RunFolder, TrainError, checkpoint};

/// The first pause after a save that failed; each is twice as long as the one before.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_mins(1);
/// How soon a pause hears of a wish to stop.
const TICK: Duration = Duration::from_millis(100);

impl Trainer<'_> {
    /// Does `save`. While the system refuses, as a full disk does, the run pauses and tries again, until
    /// `train.save_patience` ends or `stop` is set.
    pub(super) fn saved(
        &self,
        observer: &mut dyn Observer,
        stop: &AtomicBool,
        save: impl Fn(&Self) -> Result<(), TrainError>,
    ) -> Result<(), TrainError> {
        let patience = Duration::from_secs(self.config.save_patience);
        let (started, mut pause) = (Instant::now(), FIRST_PAUSE);
        loop {
            let problem = match save(self) {
                Err(problem) if problem.is_io() => problem,
                done => return done,
            };
            let left = patience.saturating_sub(started.elapsed());
            if left.is_zero() || stop.load(Ordering::Relaxed) {
                return Err(TrainError::NotSaved {
                    step: self.state.step,
                    source: problem.into(),
                    kept: self.kept(),
                    run: self.folder.root().into(),
                });
            }
            pause = pause.min(left);
            observer.warn(&format!(
                "paused after step {}: cannot save: {problem}; trying again in {} s, for {} s at most",
                self.state.step,
                pause.as_secs_f64().ceil(),
                left.as_secs()
            ));
            let until = Instant::now() + pause;
            while Instant::now() < until && !stop.load(Ordering::Relaxed) {
                std::thread::sleep(TICK.min(until.saturating_duration_since(Instant::now())));
            }
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
    }

    /// The state that the run would go on from.
    pub(super) fn kept(&self) -> Kept {
        Kept(checkpoint::newest(&self.folder))
    }

    pub(super) fn save_adapter(&self, eval_loss: Option<f64>) -> Result<(), TrainError> {
        // What others load has to sit on layers that they know.
        let adapter = self.adapter.onto_packed(&self.decoder.config.adapter_modules());
        let eval = self.state.eval_before.zip(eval_loss);
        let card = self.card.to_markdown(&self.adapter.config, &self.config, self.state.step, eval);
        publish(&self.folder.adapter(), |dir| {
            adapter.save(dir, &self.card.base, false)?;
            self.card.template.save(dir)?;
            RunFolder::write(&dir.join("README.md"), card.as_bytes())
        })
    }

    pub(super) fn save_checkpoint(&self) -> Result<(), TrainError> {
        let _save = trace_span!("save").entered();
        self.folder.seal_log()?;
        let Self { folder, state, adapter, optimizer, config, .. } = self;
        checkpoint::save(folder, state, adapter, optimizer, &self.card.base, config)?;
        if self.has_learned() && self.state.best.is_none() {
            self.save_adapter(None)?;
        }
        Ok(())
    }

    /// The first step of a warmup has a learning rate of zero: there is no adapter yet.
    fn has_learned(&self) -> bool {
        self.state.step - self.state.skipped > u64::from(self.config.warmup_steps > 0)
    }

    pub(super) fn evaluate_and_keep_best(
        &mut self,
        observer: &mut dyn Observer,
        stop: &AtomicBool,
    ) -> Result<Option<f64>, TrainError> {
        if self.data.validation.is_empty() {
            return Ok(None);
        }
        let loss = self.evaluate()?;
        self.state.eval_loss = Some(loss);
        let is_best = loss.is_finite() && self.state.best.is_none_or(|(best, _)| loss < best);
        if is_best && self.has_learned() {
            self.state.best = Some((loss, self.state.step));
            self.saved(observer, stop, |run| run.save_adapter(Some(loss)))?;
        }
        Ok(Some(loss))
    }

    /// The adapter of the lowest eval loss lies in its own folder alone. Where it was taken away or damaged
    /// it cannot be made again, unless it is the one of this very step.
    pub(super) fn find_the_best(&mut self, observer: &mut dyn Observer) -> Result<(), TrainError> {
        let Some((loss, step)) = self.state.best else { return Ok(()) };
        let Some(damage) = differences(&self.folder.adapter()).into_iter().next() else { return Ok(()) };
        if step == self.state.step {
            return self.save_adapter(Some(loss));
        }
        self.state.best = None;
        observer.warn(&format!(
            "the best adapter so far, of step {step}, is gone ({}: {}); the best from here on is kept",
            damage.path.display(),
            damage.problem
        ));
        Ok(())
    }

    pub(super) fn answer_samples(&mut self, observer: &mut dyn Observer) -> Result<(), TrainError> {
        if self.samples.is_empty() {
            return Ok(());
        }
        let _samples = trace_span!("samples").entered();
        observer.note("answering the sample prompts");
        let round = self.samples.answer(self.state.step, self.decoder, &self.adapter, self.tokenizer)?;
        self.state.samples.push(round);
        Ok(())
    }

    pub(super) fn write_samples(&self) -> Result<(), TrainError> {
        if self.samples.is_empty() {
            return Ok(());
        }
        self.folder.replace("samples.md", self.samples.to_markdown(&self.state.samples).as_bytes())
    }
}
