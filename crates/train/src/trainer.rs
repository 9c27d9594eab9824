mod not_finite;
mod saving;
#[cfg(test)]
mod tests;

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use burn::tensor::Tensor;
use pronk_data::{MicroBatches, Order, PackedBatch, PreparedDataset, TextTokenizer};
use pronk_kernels::{Dropout, DropoutKey, EmbeddingNoise};
use pronk_lora::Adapter;
use pronk_model::{Decoder, WeightBytes};
use tracing::trace_span;

use crate::checkpoint::{Checkpoint, TrainerState};
use crate::gradients::scalar;
use crate::plan::laid_out;
use crate::spans::spanned;
use crate::{
    EvalRecord, Gradients, MemoryPlan, ModelCard, Optimizer, Plan, RunFolder, Samples, Shapes, StepRecord,
    TrainConfig, TrainError, learning_rate, loss_and_gradients, loss_only, peak_memory_bytes,
};

/// Hears what happens while training.
pub trait Observer {
    /// A step is done; `total` is the number of steps in all.
    fn step(&mut self, record: &StepRecord, total: u64);
    /// Something takes a while, or has happened, that is no step.
    fn note(&mut self, message: &str);
    /// Something is not as it should be, and the run goes on.
    fn warn(&mut self, message: &str);
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Ending {
    /// All its steps are done.
    Finished(Summary),
    /// It was asked to stop; a checkpoint holds the state after `step`, unless they are off.
    Interrupted {
        /// Steps done.
        step: u64,
        /// Whether there is a checkpoint to go on from.
        saved: bool,
    },
}

/// What a finished run came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Steps in all.
    pub steps: u64,
    /// Eval loss of the base, where rows were held out.
    pub eval_before: Option<f64>,
    /// The lowest eval loss, that of the adapter kept, and its step.
    pub best: Option<(f64, u64)>,
    /// Steps that were left out, as their loss or their gradients were no numbers.
    pub skipped: u64,
}

/// What was measured on the held-out rows.
struct HeldOutLoss {
    /// Over their supervised tokens.
    mean: f64,
    /// Of their first micro-batch, summed.
    first: f64,
}

/// A run: what it learns, from what, and how far it has come.
pub struct Trainer<'a> {
    decoder: &'a Decoder,
    tokenizer: &'a TextTokenizer,
    data: &'a PreparedDataset,
    config: TrainConfig,
    plan: Plan,
    micro_batches: MicroBatches,
    folder: RunFolder,
    card: ModelCard<'a>,
    samples: Samples,
    adapter: Adapter,
    optimizer: Optimizer,
    state: TrainerState,
    memory: MemoryPlan,
    save_under_way: Option<saving::SaveUnderWay>,
}

impl<'a> Trainer<'a> {
    /// A run that starts from `adapter`.
    #[allow(clippy::too_many_arguments)] // each is a part of a run, named where it is passed
    pub fn new(
        decoder: &'a Decoder,
        weights: WeightBytes,
        tokenizer: &'a TextTokenizer,
        data: &'a PreparedDataset,
        order: Order,
        micro_batches: MicroBatches,
        config: TrainConfig,
        adapter: Adapter,
        folder: RunFolder,
        card: ModelCard<'a>,
        samples: Samples,
    ) -> Result<Self, TrainError> {
        if data.train.is_empty() {
            return Err(TrainError::NoRows);
        }
        let plan = Plan::new(&config, order, data.mixture.clone());
        let optimizer = Optimizer::new(&config, &adapter);
        let state = TrainerState::new(data.key.clone());
        let shapes = Shapes::new(&decoder.config.tuned_by(&adapter), weights, &adapter.config)?;
        let memory = MemoryPlan::new(&config, shapes);
        let run = Self {
            decoder,
            tokenizer,
            data,
            config,
            plan,
            micro_batches,
            folder,
            card,
            samples,
            adapter,
            optimizer,
            state,
            memory,
            save_under_way: None,
        };
        run.memory.check(&run.largest_micro_batch())?;
        Ok(run)
    }

    /// The same run, set to where its `newest` whole checkpoint left it; to its beginning where it was ended
    /// before there was one. Other rows than it began with are refused, unless the run is to go on as it was
    /// `changed`.
    pub fn resume(
        mut self,
        newest: Option<Checkpoint>,
        changed: bool,
        warn: impl Fn(&str),
    ) -> Result<Self, TrainError> {
        let Some(Checkpoint { state, adapter, optimizer }) = newest else {
            if self.folder.last_logged_step() > 0 {
                return Err(TrainError::NoCheckpoint(self.folder.root().into()));
            }
            warn("this run ended before its first checkpoint: it begins anew");
            return Ok(self);
        };
        if state.data_key != self.data.key && !changed {
            return Err(TrainError::OtherRows(self.folder.root().into()));
        }
        (self.state, self.adapter, self.optimizer) = (state, adapter, optimizer);
        self.state.data_key.clone_from(&self.data.key);
        if let (true, Some(best)) = (changed, &mut self.state.best) {
            best.first_loss = None;
        }
        self.find_the_best(warn)?;
        Ok(self)
    }

    /// Steps done.
    pub fn step_number(&self) -> u64 {
        self.state.step
    }

    /// Steps in all.
    pub fn total_steps(&self) -> u64 {
        self.plan.total_steps
    }

    /// Trains to the end, or until `stop` is set: then the step is finished and saved first.
    pub fn run(&mut self, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<Ending, TrainError> {
        self.all_steps(observer, stop).map_err(|error| self.ended_by(error))
    }

    fn all_steps(&mut self, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<Ending, TrainError> {
        if self.state.step == 0 {
            self.folder.rewind_log(None)?;
            if !self.before_the_first_step(observer, stop)? {
                return Ok(self.interrupted());
            }
        } else {
            self.folder.rewind_log(Some(self.state.step))?;
        }
        self.take_memory();
        // What a stop came in between of is taken up where it was.
        let mut taken = self.state.unmeasured.take();
        if let Some(record) = &taken {
            self.folder.rewind_log(Some(record.step - 1))?;
        }
        while taken.is_some() || self.state.step < self.plan.total_steps {
            self.heed_save(observer, stop)?;
            let record = taken.take().map_or_else(|| self.step(observer), Ok)?;
            if self.conclude(record, observer, stop)?.is_break() {
                self.finish_save(observer, stop)?;
                return Ok(self.interrupted());
            }
        }
        self.finish_save(observer, stop)?;
        if self.state.best.is_none() {
            self.saved(observer, stop, |run| run.save_adapter(None))?;
        }
        self.answer_samples(observer)?;
        self.saved(observer, stop, |run| run.write_samples().and_then(|()| run.folder.seal_log()))?;
        self.read_back()?;
        let TrainerState { eval_before, skipped, .. } = self.state;
        let best = self.state.best.as_ref().map(|best| (best.eval_loss, best.step));
        Ok(Ending::Finished(Summary { steps: self.plan.total_steps, eval_before, best, skipped }))
    }

    /// What is due after a step: measuring, telling, answering, saving. Breaks where the run is to stop; then it is saved.
    fn conclude(
        &mut self,
        mut record: StepRecord,
        observer: &mut dyn Observer,
        stop: &AtomicBool,
    ) -> Result<ControlFlow<()>, TrainError> {
        let (done, last) = (self.state.step, self.state.step == self.plan.total_steps);
        let stopping = || !last && stop.load(Ordering::Relaxed);
        let mut is_best = false;
        if is_due(done, self.config.eval_steps) || (last && self.config.eval_steps > 0) {
            (record.eval_loss, is_best) = self.evaluate_and_compare(stopping)?;
            let left_off = record.eval_loss.is_none() && !self.data.validation.is_empty();
            self.state.unmeasured = left_off.then(|| record.clone());
        }
        self.saved(observer, stop, |run| run.folder.log(&record))?;
        observer.step(&record, self.plan.total_steps);
        if done == self.plan.total_steps.div_ceil(2) && !last && self.state.unmeasured.is_none() {
            self.answer_samples(observer)?;
            self.saved(observer, stop, Self::write_samples)?;
        }
        let stopping = stopping() || self.state.unmeasured.is_some();
        let due = is_due(done, self.config.save_steps) || last || stopping;
        self.begin_save(is_best, due && self.config.save_steps > 0, observer, stop)?;
        Ok(if stopping { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    }

    fn interrupted(&self) -> Ending {
        Ending::Interrupted { step: self.state.step, saved: self.config.save_steps > 0 }
    }

    /// The worst comes first, so that a run that does not fit ends in its first minute: the longest
    /// micro-batch, unless there is plenty of memory for it, a save, an evaluation, the samples. Nothing is
    /// tried twice here. False where it was stopped meanwhile.
    fn before_the_first_step(
        &mut self,
        observer: &mut dyn Observer,
        stop: &AtomicBool,
    ) -> Result<bool, TrainError> {
        let longest = self.largest_micro_batch();
        if !self.memory.is_roomy_for(&longest) {
            observer.note("rehearsing the longest micro-batch");
            let keep = self.memory.keep(&longest);
            let rehearsal = loss_and_gradients(self.decoder, &self.adapter, &longest, 1, keep, None, None);
            let loss = scalar(&rehearsal.sum)?;
            if !loss.is_finite() {
                self.rehearsed_not_finite(loss, observer)?;
            }
        }
        if self.config.save_steps > 0 {
            self.save_checkpoint()?;
        }
        self.answer_samples(observer)?;
        self.write_samples()?;
        if self.config.eval_steps > 0 && !self.data.validation.is_empty() {
            observer.note("measuring the base on the held-out rows");
            let measured = self.evaluate(|| stop.load(Ordering::Relaxed))?;
            let Some(HeldOutLoss { mean: eval_loss, .. }) = measured else { return Ok(false) };
            self.state.eval_before = Some(eval_loss);
            self.folder.log(&EvalRecord { step: 0, epoch: 0.0, eval_loss })?;
        }
        Ok(true)
    }

    /// Takes what the graphs of the next micro-batch will lie in, so that the first step does not ask for it page by page.
    fn take_memory(&self) {
        let batches = self.plan.micro_batches(self.state.step, &self.data.train, self.micro_batches);
        let shapes = self.memory.shapes();
        if let Some(batch) = batches.first().filter(|_| !shapes.on_card()) {
            let graphs = shapes.footprint(batch.into(), self.memory.keep(batch).graphs).kept_graphs;
            pronk_kernels::take_memory(usize::try_from(graphs).unwrap_or(0));
        }
    }

    /// One optimizer step.
    fn step(&mut self, observer: &mut dyn Observer) -> Result<StepRecord, TrainError> {
        let started = Instant::now();
        let step = self.state.step;
        let _step = trace_span!("step", step = step + 1).entered();
        let config = self.config.clone();
        let rate = learning_rate(
            config.schedule,
            config.learning_rate,
            config.warmup_steps,
            self.plan.total_steps,
            step,
        );
        let batches = trace_span!("data")
            .in_scope(|| self.plan.micro_batches(step, &self.data.train, self.micro_batches));
        let tokens: usize = batches.iter().map(PackedBatch::tokens).sum();
        let supervised_tokens: usize = batches.iter().map(PackedBatch::supervised).sum();

        let (sums, mut gradients) = self.learn(step, &batches, supervised_tokens);
        let loss = sums.iter().map(scalar).sum::<Result<f64, _>>()? / supervised_tokens as f64;
        let grad_norm = gradients.norm()?;
        let skipped = self.skipped(loss, grad_norm, observer)?;
        if config.max_grad_norm > 0.0 && grad_norm > config.max_grad_norm {
            // The small number is PyTorch's, so that clipped runs agree.
            gradients = gradients.scaled(config.max_grad_norm / (grad_norm + 1e-6));
        }
        if skipped.is_none() {
            let optimizer = || self.optimizer.step(&mut self.adapter, &gradients, rate, step + 1);
            spanned(&trace_span!("optimizer"), self.decoder.device(), optimizer)?;
        }
        (self.state.step, self.state.eval_loss) = (step + 1, None);

        let seconds = started.elapsed().as_secs_f64();
        Ok(StepRecord {
            step: step + 1,
            epoch: self.plan.epoch(step + 1),
            loss,
            learning_rate: rate,
            grad_norm,
            tokens,
            supervised_tokens,
            tokens_per_s: tokens as f64 / seconds,
            seconds,
            peak_memory_bytes: peak_memory_bytes(),
            eval_loss: None,
            skipped,
        })
    }

    /// The losses of a step's micro-batches, and the gradients of them all.
    fn learn(
        &self,
        step: u64,
        batches: &[PackedBatch],
        supervised_tokens: usize,
    ) -> (Vec<Tensor<1>>, Gradients) {
        let mut gradients = Gradients::default();
        let mut sums = Vec::new();
        for (micro_batch, batch) in (0..).zip(batches) {
            let _micro_batch = trace_span!("micro_batch", micro_batch, tokens = batch.tokens()).entered();
            let key = DropoutKey { seed: self.config.seed, step, micro_batch };
            let (p, alpha) = (self.adapter.config.dropout, self.config.neftune_noise_alpha);
            let micro = loss_and_gradients(
                self.decoder,
                &self.adapter,
                batch,
                supervised_tokens,
                self.memory.keep(batch),
                (p > 0.0).then_some(Dropout { p, key }),
                (alpha > 0.0).then_some(EmbeddingNoise { alpha, key }),
            );
            gradients.accumulate(micro.gradients);
            sums.push(micro.sum);
        }
        (sums, gradients)
    }

    fn largest_micro_batch(&self) -> PackedBatch {
        self.plan.largest_micro_batch(&self.data.train, self.micro_batches)
    }

    /// The loss on the held-out rows; none where it was `stopping` meanwhile.
    fn evaluate(&self, stopping: impl Fn() -> bool) -> Result<Option<HeldOutLoss>, TrainError> {
        let _eval = trace_span!("eval").entered();
        let batches = self.held_out();
        let supervised: usize = batches.iter().map(PackedBatch::supervised).sum();
        let mut sums = Vec::with_capacity(batches.len());
        for batch in &batches {
            if stopping() {
                return Ok(None);
            }
            sums.push(scalar(&loss_only(self.decoder, Some(&self.adapter), batch))?);
        }
        let mean = sums.iter().sum::<f64>() / supervised as f64;
        Ok(sums.first().map(|&first| HeldOutLoss { mean, first }))
    }

    /// The micro-batches of the rows that nothing is learned from.
    fn held_out(&self) -> Vec<PackedBatch> {
        let rows: Vec<usize> = (0..self.data.validation.len()).collect();
        laid_out(&self.data.validation, &rows, self.micro_batches)
    }
}

fn is_due(step: u64, every: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}
