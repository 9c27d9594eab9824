//! What moves on the terminal while something takes a while.

use std::io::{self, IsTerminal};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use pronk_train::{Observer, StepRecord};

use crate::terminal::{say, warn};

/// A bar over `total` of something; invisible where standard error is no terminal.
pub fn bar(what: &'static str, total: usize) -> ProgressBar {
    let bar = ProgressBar::new(total as u64).with_message(what);
    bar.set_style(style("{msg:20} {wide_bar:.cyan/dim} {pos}/{len} {eta:>4}"));
    bar
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// The live line of a training run. Where standard error is no terminal, a plain line a step.
pub struct TrainingProgress {
    bar: ProgressBar,
    eval_loss: Option<f64>,
    plain: bool,
}

impl TrainingProgress {
    /// For a run of `total` steps, `done` of them behind it.
    pub fn new(done: u64, total: u64) -> Self {
        let bar = ProgressBar::new(total).with_position(done);
        bar.set_style(style("{wide_bar:.cyan/dim} step {pos}/{len}  {msg}  {eta} left"));
        bar.enable_steady_tick(Duration::from_millis(500));
        bar.reset_eta();
        Self { bar, eval_loss: None, plain: !io::stderr().is_terminal() }
    }

    /// Takes the bar off the terminal.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Observer for TrainingProgress {
    fn step(&mut self, record: &StepRecord, total: u64) {
        self.eval_loss = record.eval_loss.or(self.eval_loss);
        let eval = self.eval_loss.map_or(String::new(), |loss| format!("eval {loss:.4}  "));
        let memory =
            record.peak_memory_bytes.map_or(String::new(), |b| format!("  {:.1} GB", b as f64 / 1e9));
        let message = format!("loss {:.4}  {eval}{:.0} tok/s{memory}", record.loss, record.tokens_per_s);
        if self.plain {
            say(&format!("step {}/{total}  {message}", record.step));
        } else {
            self.bar.set_position(record.step);
            self.bar.set_message(message);
        }
    }

    fn note(&mut self, message: &str) {
        if self.plain {
            say(message);
        } else {
            self.bar.set_message(message.to_owned());
        }
    }

    fn warn(&mut self, message: &str) {
        // It stays, above a bar that goes on below it.
        self.bar.suspend(|| warn(message));
    }
}
