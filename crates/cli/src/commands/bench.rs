use std::collections::BTreeMap;
use std::fmt::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use miette::{IntoDiagnostic, Result, miette};
use pronk_kernels::open_device;
use pronk_model::Memory;
use pronk_train::{Ending, Observer, RunFolder, Shapes, StepRecord, Workload};
use serde::Serialize;

use crate::args;
use crate::base;
use crate::loaded::{LoadedRun, Start};
use crate::profile::{Totals, listen};
use crate::recipe::Recipe;
use crate::sizes;
use crate::speed::operations_per_second;
use crate::terminal::{print, say, warn};

/// Tokens of the product that tells the machine's peak.
const PEAK_TOKENS: usize = 1024;
const PEAK_ROUNDS: usize = 2;

/// `pronk bench`
pub fn run(args: &args::Bench) -> Result<ExitCode> {
    let started = Instant::now();
    let mut recipe = Recipe::read(&args.recipe, &args.set)?;
    if args.steps == 0 {
        return Err(miette!("--steps: expected a whole number from 1, found 0"));
    }
    let temporary = tempfile::tempdir().into_diagnostic()?;
    recipe.run.dir = temporary.path().join("run");
    (recipe.train.max_steps, recipe.run.samples) = (Some(args.warmup + args.steps), 0);
    (recipe.train.eval_steps, recipe.train.save_steps) = (0, 0);
    let totals = Totals::default();
    let _trace = listen(args.profile.as_deref(), Some(totals.clone()))?;

    let opened = base::of_recipe(&recipe)?;
    let computes_in = Memory::of(&open_device(&args.device.device).into_diagnostic()?);
    let shapes = sizes::shapes(&recipe, &opened, (recipe.base.quantize, recipe.base.weights), computes_in)?;
    let folder = RunFolder::create(&recipe.run.dir).into_diagnostic()?;
    let Some(loaded) = LoadedRun::load(recipe, opened, &args.device.device, &folder)? else {
        return Ok(ExitCode::from(130));
    };
    let mut stopwatch = Stopwatch { started, warmup: args.warmup, totals, first: None, records: Vec::new() };
    let ending = loaded.trainer(folder, Start::Anew)?.run(&mut stopwatch, &loaded.stop).into_diagnostic()?;
    if matches!(ending, Ending::Interrupted { .. }) {
        return Ok(ExitCode::from(130));
    }
    let parts = stopwatch.totals.take();
    let precision = loaded.recipe.base.load_config().precision;
    let peak = operations_per_second(loaded.decoder.device(), precision, PEAK_TOKENS, PEAK_ROUNDS);
    let measured = Measured::new(&args.device.device, &stopwatch, &parts, &shapes, peak);
    let json = || serde_json::to_string(&measured).into_diagnostic();
    print(&if args.json { json()? + "\n" } else { measured.table() });
    Ok(ExitCode::SUCCESS)
}

/// Notes the steps, and forgets what happened before the last one to warm up was done.
struct Stopwatch {
    started: Instant,
    warmup: u64,
    totals: Totals,
    /// From the start to the end of the first step.
    first: Option<Duration>,
    records: Vec<StepRecord>,
}

impl Observer for Stopwatch {
    fn step(&mut self, record: &StepRecord, total: u64) {
        self.first.get_or_insert_with(|| self.started.elapsed());
        say(&format!("step {}/{total}  {:.0} tok/s", record.step, record.tokens_per_s));
        if record.step <= self.warmup {
            self.totals.take();
        } else {
            self.records.push(record.clone());
        }
    }

    fn note(&mut self, message: &str) {
        say(message);
    }

    fn warn(&mut self, message: &str) {
        warn(message);
    }
}

/// What a benchmark came to. Times are in seconds, of all measured steps together.
#[derive(Debug, Serialize)]
struct Measured {
    device: String,
    steps: usize,
    tokens: usize,
    supervised_tokens: usize,
    seconds: f64,
    tokens_per_s: f64,
    supervised_tokens_per_s: f64,
    /// Tokens a second of the slowest step and of the fastest.
    tokens_per_s_range: [f64; 2],
    last_loss: f64,
    /// Parts of the steps' seconds; they add up.
    parts: BTreeMap<&'static str, f64>,
    /// Of the steps' seconds, the share in products with the base's matrices, in those with the adapter's, and in
    /// attention, which is two products and a softmax between them; on the host's processor alone, where they are
    /// waited for.
    products_share: Option<f64>,
    adapter_share: Option<f64>,
    attention_share: Option<f64>,
    /// Operations a second that the model asks for: what is computed a second time does not count.
    model_operations_per_s: f64,
    peak_operations_per_s: Option<f64>,
    utilization: Option<f64>,
    peak_memory_bytes: Option<u64>,
    seconds_to_first_step: Option<f64>,
}

/// The parts of a step, as their spans are called, and what they are called here.
const PARTS: [(&str, &str); 6] = [
    ("data", "waiting for data"),
    ("forward", "forward"),
    ("head", "head and loss"),
    ("recompute", "recompute"),
    ("backward", "backward"),
    ("optimizer", "optimizer"),
];
const REST: &str = "all else";

impl Measured {
    fn new(
        device: &str,
        stopwatch: &Stopwatch,
        spans: &BTreeMap<&'static str, Duration>,
        shapes: &Shapes,
        peak: Option<f64>,
    ) -> Self {
        let records = &stopwatch.records;
        let seconds: f64 = records.iter().map(|r| r.seconds).sum();
        let tokens = records.iter().map(|r| r.tokens).sum();
        let supervised = records.iter().map(|r| r.supervised_tokens).sum();
        let took = |span: &str| spans.get(span).map_or(0.0, Duration::as_secs_f64);
        let mut parts: BTreeMap<_, _> = PARTS.iter().map(|&(span, _)| (span, took(span))).collect();
        parts.insert(REST, (seconds - parts.values().sum::<f64>()).max(0.0));
        let share = |span: &str| spans.contains_key(span).then(|| took(span) / seconds);
        let operations = shapes.operations(Workload { tokens, supervised, pairs: 0 }, usize::MAX) / seconds;
        let speeds = || records.iter().map(|r| r.tokens_per_s);
        Self {
            device: device.to_owned(),
            steps: records.len(),
            tokens,
            supervised_tokens: supervised,
            seconds,
            tokens_per_s: tokens as f64 / seconds,
            supervised_tokens_per_s: supervised as f64 / seconds,
            tokens_per_s_range: [speeds().fold(f64::INFINITY, f64::min), speeds().fold(0.0, f64::max)],
            last_loss: records.last().map_or(f64::NAN, |r| r.loss),
            parts,
            products_share: share("product"),
            adapter_share: share("adapter"),
            attention_share: share("attention"),
            model_operations_per_s: operations,
            peak_operations_per_s: peak,
            utilization: peak.map(|peak| operations / peak),
            peak_memory_bytes: records.last().and_then(|r| r.peak_memory_bytes),
            seconds_to_first_step: stopwatch.first.map(|d| d.as_secs_f64()),
        }
    }

    fn table(&self) -> String {
        let mut text = format!("{} steps on {}\n\n", self.steps, self.device);
        let mut row = |what: &str, value: String| {
            let _ = writeln!(text, "{what:<38}{value:>12}");
        };
        let optional = |value: Option<String>| value.unwrap_or_else(|| "not told".into());
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        row("tokens a second", format!("{:.0}", self.tokens_per_s));
        let [slowest, fastest] = self.tokens_per_s_range;
        row("  slowest and fastest step", format!("{slowest:.0} to {fastest:.0}"));
        row("supervised tokens a second", format!("{:.0}", self.supervised_tokens_per_s));
        row("seconds a step", format!("{:.3}", self.seconds / self.steps as f64));
        for (span, name) in PARTS.into_iter().chain([(REST, REST)]) {
            let seconds = self.parts.get(span).copied().unwrap_or(0.0);
            row(&format!("  {name}"), format!("{:.3}", seconds / self.steps as f64));
        }
        row("share in products with the base", optional(self.products_share.map(percent)));
        row("  with the adapter", optional(self.adapter_share.map(percent)));
        row("  in attention", optional(self.attention_share.map(percent)));
        row("model's GFLOP/s", format!("{:.1}", self.model_operations_per_s / 1e9));
        let peak = self.peak_operations_per_s.map(|peak| format!("{:.1}", peak / 1e9));
        row("measured peak, GFLOP/s", optional(peak));
        row("utilization", optional(self.utilization.map(percent)));
        let memory = self.peak_memory_bytes.map(|bytes| format!("{:.2} GB", bytes as f64 / 1e9));
        row("peak memory", optional(memory));
        let first = self.seconds_to_first_step.map(|seconds| format!("{seconds:.1}"));
        row("seconds to the first step's end", optional(first));
        text
    }
}
