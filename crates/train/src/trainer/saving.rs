//! What a run keeps, and what it does when the disk does not take it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pronk_data::PackedBatch;
use pronk_lora::{ADAPTER_WEIGHTS, Adapter, AdapterFiles};
use tracing::trace_span;

use super::{HeldOutLoss, Observer, Trainer};
use crate::checkpoint::{Best, Snapshot};
use crate::error::Kept;
use crate::gradients::scalar;
use crate::manifest::{Content, Manifest, differences};
use crate::publish::publish;
use crate::{ModelCard, RunFolder, TrainConfig, TrainError, checkpoint, loss_only};

/// The first pause after a save that failed; each is twice as long as the one before.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// How far the loss of an adapter that was read back may be from what it was, relative to that: what is fixed beside an
/// adapter is a part of it in its file, and rounded otherwise. On other runs it is the same number.
const READ_BACK: f64 = 1e-2;
const LONGEST_PAUSE: Duration = Duration::from_mins(1);
/// How soon a pause hears of a wish to stop.
const TICK: Duration = Duration::from_millis(100);

/// What a run writes at one moment: the adapter to use, a state to go on from, or both. It lies in the host's memory,
/// so that the next step may change what it was taken from.
struct Save {
    folder: RunFolder,
    config: TrainConfig,
    adapter: Option<AdapterFolder>,
    checkpoint: Option<Snapshot>,
}

/// The adapter to use, with what lies beside it.
struct AdapterFolder {
    adapter: AdapterFiles,
    /// The prompt template and the model card, by file name; the tokenizer, where tokens were added to it.
    beside: Vec<(&'static str, String)>,
}

impl Save {
    /// The adapter first: a checkpoint that tells of the best one must not be there before that is.
    fn write(&self) -> Result<(), TrainError> {
        let _save = trace_span!("save").entered();
        if let Some(AdapterFolder { adapter, beside }) = &self.adapter {
            publish(&self.folder.adapter(), |dir| {
                adapter.write(dir)?;
                let mut files = beside.iter();
                files.try_for_each(|(name, text)| RunFolder::write(&dir.join(name), text.as_bytes()))
            })?;
        }
        self.checkpoint.as_ref().map_or(Ok(()), |checkpoint| checkpoint.write(&self.folder, &self.config))
    }
}

/// A save that a thread of its own writes while the run goes on.
pub(super) struct SaveUnderWay {
    save: Arc<Save>,
    /// `None` where its end was waited for, or there could be no thread.
    thread: Option<JoinHandle<Result<(), TrainError>>>,
}

impl SaveUnderWay {
    fn begin(save: Save) -> Self {
        let save = Arc::new(save);
        let written = Arc::clone(&save);
        let thread = thread::Builder::new().name("save".into()).spawn(move || written.write());
        Self { save, thread: thread.ok() }
    }

    /// Waits for the thread, where there is one, and hands on what it came to. A panic there is one here.
    fn end(&mut self) -> Option<Result<(), TrainError>> {
        let ended = self.thread.take()?.join();
        Some(ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    }
}

impl Drop for SaveUnderWay {
    /// A run that fails meanwhile still keeps what it was writing.
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // the run's own failure is told, and the last good state with it
        }
    }
}

impl Trainer<'_> {
    /// Does `save`. While the system refuses, as a full disk does, the run pauses and tries again, until
    /// `train.save_patience` ends or `stop` is set.
    pub(super) fn saved(
        &mut self,
        observer: &mut dyn Observer,
        stop: &AtomicBool,
        mut save: impl FnMut(&Self) -> Result<(), TrainError>,
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

    /// Writes a checkpoint of the steps that went well, for a run that ends here. Where that fails, an older one is kept; so it
    /// is where the adapter itself is what went wrong, and gives no loss on the rows of the step before either.
    pub(super) fn save_before_it_ends(&mut self) {
        self.save_under_way = None; // which is waited for
        let step = self.state.step;
        let is_there =
            checkpoint::list(&self.folder).get(&step).is_some_and(|dir| differences(dir).is_empty());
        if self.config.save_steps == 0 || step == 0 || is_there {
            return;
        }
        let before = self.plan.micro_batches(step - 1, &self.data.train, self.micro_batches);
        let loss = |batch: &PackedBatch| scalar(&loss_only(self.decoder, Some(&self.adapter), batch));
        if before.iter().all(|batch| loss(batch).is_ok_and(f64::is_finite)) {
            let _ = self.save_beside_all();
        }
    }

    /// The last checkpoint, with the adapter as `begin_save` has it, and none removed for it.
    fn save_beside_all(&self) -> Result<(), TrainError> {
        self.folder.seal_log()?;
        let usable = self.has_learned() && self.state.best.is_none();
        let mut save = self.save_of(usable.then(|| self.adapter_folder(None)).transpose()?, true)?;
        save.config.keep_last = usize::MAX;
        save.write()
    }

    /// The state that the run would go on from.
    pub fn kept(&mut self) -> Kept {
        self.save_under_way = None; // it may be that of the save which is being written
        Kept(checkpoint::newest(&self.folder))
    }

    /// Begins to write the adapter where it is the best so far, and a checkpoint where that is `due`. The save
    /// before is waited for, so that one at a time is written, in order.
    pub(super) fn begin_save(
        &mut self,
        is_best: bool,
        due: bool,
        observer: &mut dyn Observer,
        stop: &AtomicBool,
    ) -> Result<(), TrainError> {
        let usable = is_best || (due && self.has_learned() && self.state.best.is_none());
        if !usable && !due {
            return Ok(());
        }
        self.finish_save(observer, stop)?;
        if due {
            self.saved(observer, stop, |run| run.folder.seal_log())?;
        }
        let eval_loss = self.state.eval_loss.filter(|_| is_best);
        let adapter = usable.then(|| self.adapter_folder(eval_loss)).transpose()?;
        if let (true, Some(folder), Some(best)) = (is_best, &adapter, &mut self.state.best) {
            best.sha256 = Some(Content::of(folder.adapter.weights()).sha256().to_owned());
        }
        let save = self.save_of(adapter, due)?;
        self.save_under_way = Some(SaveUnderWay::begin(save));
        Ok(())
    }

    /// Hears of a save that has ended meanwhile: where it failed, the run pauses and writes the same once more.
    pub(super) fn heed_save(
        &mut self,
        observer: &mut dyn Observer,
        stop: &AtomicBool,
    ) -> Result<(), TrainError> {
        let is_over = |saving: &SaveUnderWay| saving.thread.as_ref().is_none_or(JoinHandle::is_finished);
        if self.save_under_way.as_ref().is_some_and(is_over) {
            self.finish_save(observer, stop)
        } else {
            Ok(())
        }
    }

    /// Waits for the save that is being written, if there is one.
    pub(super) fn finish_save(
        &mut self,
        observer: &mut dyn Observer,
        stop: &AtomicBool,
    ) -> Result<(), TrainError> {
        let Some(mut saving) = self.save_under_way.take() else { return Ok(()) };
        let mut written = saving.end();
        self.saved(observer, stop, |_| written.take().unwrap_or_else(|| saving.save.write()))
    }

    fn adapter_folder(&self, eval_loss: Option<f64>) -> Result<AdapterFolder, TrainError> {
        let dir = self.folder.adapter();
        self.adapter.must_have_learned(&dir)?;
        // What others load has to sit on layers that they know.
        let adapter = self.adapter.onto_packed(&self.decoder.config.adapter_modules());
        let eval = self.state.eval_before.zip(eval_loss);
        let card = self.card.to_markdown(&self.adapter.config, self.state.step, eval);
        let template = self.card.template;
        let mut beside = vec![(template.file_name(), template.source().to_owned()), (ModelCard::FILE, card)];
        if !self.tokenizer.added_tokens().is_empty() {
            beside.extend(self.tokenizer.files()?);
        }
        Ok(AdapterFolder { adapter: adapter.files(&dir, &self.card.base, true)?, beside })
    }

    fn save_of(&self, adapter: Option<AdapterFolder>, checkpoint: bool) -> Result<Save, TrainError> {
        let Self { folder, config, state, optimizer, .. } = self;
        let snapshot = || Snapshot::take(folder, state, &self.adapter, optimizer, &self.card.base);
        let checkpoint = checkpoint.then(snapshot).transpose()?;
        Ok(Save { folder: folder.clone(), config: config.clone(), adapter, checkpoint })
    }

    /// Writes the adapter, and waits for it.
    pub(super) fn save_adapter(&self, eval_loss: Option<f64>) -> Result<(), TrainError> {
        self.save_of(Some(self.adapter_folder(eval_loss)?), false)?.write()
    }

    /// Writes a checkpoint, and waits for it.
    pub(super) fn save_checkpoint(&self) -> Result<(), TrainError> {
        self.folder.seal_log()?;
        self.save_of(None, true)?.write()
    }

    /// The first step of a warmup has a learning rate of zero: there is no adapter yet.
    fn has_learned(&self) -> bool {
        self.state.step - self.state.skipped > u64::from(self.config.warmup_steps > 0)
    }

    /// Measures the loss on the held-out rows, and says whether it is the lowest so far. There is none without such rows,
    /// and where it was `stopping` meanwhile.
    pub(super) fn evaluate_and_compare(
        &mut self,
        stopping: impl Fn() -> bool,
    ) -> Result<(Option<f64>, bool), TrainError> {
        if self.data.validation.is_empty() {
            return Ok((None, false));
        }
        let Some(HeldOutLoss { mean: loss, first }) = self.evaluate(stopping)? else {
            return Ok((None, false));
        };
        self.state.eval_loss = Some(loss);
        let is_lowest = loss.is_finite() && self.state.best.as_ref().is_none_or(|best| loss < best.eval_loss);
        let is_best = is_lowest && self.has_learned();
        if is_best {
            let step = self.state.step;
            self.state.best = Some(Best { eval_loss: loss, step, first_loss: Some(first), sha256: None });
        }
        Ok((Some(loss), is_best))
    }

    /// The adapter of the lowest eval loss lies in its own folder alone. Where it was taken away or damaged, or is of a
    /// later step that was not saved, it cannot be made again, unless it is the one of this very step.
    pub(super) fn find_the_best(&mut self, warn: impl Fn(&str)) -> Result<(), TrainError> {
        let Some(best) = &self.state.best else { return Ok(()) };
        let (step, loss) = (best.step, best.eval_loss);
        let Some(problem) = self.sets_apart_from(best) else { return Ok(()) };
        if step == self.state.step {
            return self.save_adapter(Some(loss));
        }
        self.state.best = None;
        warn(&format!(
            "the best adapter so far, of step {step}, is gone ({problem}); the best from here on is kept"
        ));
        Ok(())
    }

    /// What sets the adapter in its folder apart from the `best`.
    fn sets_apart_from(&self, best: &Best) -> Option<String> {
        let dir = self.folder.adapter();
        if let Some(damage) = differences(&dir).into_iter().next() {
            return Some(format!("{}: {}", damage.path.display(), damage.problem));
        }
        // Which is the file's: nothing differs.
        let manifest = Manifest::read(&dir).ok().flatten();
        let found = manifest.as_ref().and_then(|manifest| manifest.sha256_of(ADAPTER_WEIGHTS));
        let is_it = found.is_some() && found == best.sha256.as_deref();
        (!is_it).then(|| format!("{}: it is of another step", dir.join(ADAPTER_WEIGHTS).display()))
    }

    /// Loads the adapter as anybody would, and holds what it gives against what it gave when it was saved.
    pub(super) fn read_back(&self) -> Result<(), TrainError> {
        let (path, device) = (self.folder.adapter(), self.decoder.device());
        let loaded = Adapter::load(&path, &self.decoder.config.adapter_modules(), device)?;
        let loss =
            |adapter: &Adapter, batch: &PackedBatch| scalar(&loss_only(self.decoder, Some(adapter), batch));
        let (batch, expected) = match (self.held_out().into_iter().next(), &self.state.best) {
            (Some(batch), Some(Best { first_loss: Some(expected), .. })) => (batch, *expected),
            (Some(_), Some(_)) => return Ok(()),
            // The last one, which is at hand.
            _ => {
                let batch = self.largest_micro_batch();
                let expected = loss(&self.adapter, &batch)?;
                (batch, expected)
            }
        };
        let found = loss(&loaded, &batch)?;
        if (found - expected).abs() <= READ_BACK * expected.abs() {
            return Ok(());
        }
        let tokens = batch.supervised() as f64;
        let (expected, found) = (expected / tokens, found / tokens);
        Err(TrainError::ReadsBackOtherwise {
            path,
            expected,
            found,
            kept: Kept(checkpoint::newest(&self.folder)),
        })
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
