use std::fmt::Write;

use miette::{IntoDiagnostic, Result, miette};
use pronk_data::PromptTemplate;
use pronk_kernels::open_device;
use pronk_model::{Memory, Residency};
use pronk_train::{Footprint, MemoryPlan, Plan, SavedInputs, Workload, available_memory_bytes};

use super::prep;
use crate::args;
use crate::base::{self, OpenedBase};
use crate::cards::{Card, UTILIZATION};
use crate::recipe::{Quantize, Recipe};
use crate::sizes::{self, Settled, settle, shapes};
use crate::speed::operations_per_second;
use crate::terminal::print;

/// Tokens of the product that tells how fast this machine multiplies.
const TOKENS: usize = 512;

/// Of a step's time, about the share that goes into products with the base, by a profile of SmolLM2's.
const SHARE_OF_PRODUCTS: f64 = 0.7;

/// `pronk plan`
pub fn run(args: &args::Plan) -> Result<()> {
    let mut recipe = Recipe::read(&args.recipe, &args.set)?;
    if let Some(price) = args.price.filter(|price| !price.is_finite() || *price < 0.0) {
        return Err(miette!("--price: expected dollars an hour, a number from 0, found {price}"));
    }
    let card = args.gpu.as_deref().map(Card::named).transpose()?;
    let opened = base::of_recipe(&recipe)?;
    let computes_in = if card.is_some() { Memory::Card } else { Memory::Host };
    let memory = sizes::memory(&recipe, &opened, computes_in)?;
    let memory = match card {
        Some(card) => memory.within(card.memory),
        None => memory,
    };
    let template = PromptTemplate::load(&recipe.data.template, &opened.tokenizer).into_diagnostic()?;
    let sized = settle(&mut recipe, &opened, &template, &memory, |config| {
        prep::with_bar(config, &opened, &std::env::temp_dir())?.load().into_diagnostic()
    })?;
    if sized.data.train.is_empty() {
        return Err(miette!("no rows to train on: every record was dropped or held out"));
    }
    print(&sized.found);
    let outlook = Outlook::new(&recipe, &sized, memory, budget(card, &recipe));
    print(&outlook.table(&recipe));
    print(&match card {
        None => outlook.cost("expected here", outlook.seconds_here(&recipe), args.price),
        Some(card) => {
            let share = UTILIZATION * 100.0;
            let cost = outlook.cost("estimated", outlook.seconds_on(card), args.price);
            let teraflops = card.operations_per_s / 1e12;
            cost + &format!(
                "an estimate: {share:.0} % of the {teraflops} TFLOP/s in bf16 of the {}'s data sheet, unless reading the \
                 weights takes longer\n",
                card.name
            )
        }
    });
    match &outlook.budget {
        Some((budget, whose)) if outlook.footprint.peak() > *budget => {
            print(&outlook.advice(&recipe, &opened, computes_in));
            Err(miette!("{} do not fit in {whose}, {}", size(outlook.footprint.peak()), size(*budget)))
        }
        _ => Ok(()),
    }
}

/// What the run is held against, and whose word that is.
fn budget(card: Option<Card>, recipe: &Recipe) -> Option<(u64, String)> {
    if let Some(card) = card {
        return Some((card.memory, format!("the memory of the {}", card.name)));
    }
    if let Some(budget) = recipe.train.memory_budget {
        return Some((budget.as_u64(), "train.memory_budget".into()));
    }
    available_memory_bytes().map(|free| (free, "the memory that is free here".into()))
}

/// A run, as far as it can be told from shapes and rows.
struct Outlook {
    memory: MemoryPlan,
    budget: Option<(u64, String)>,
    largest: Workload,
    kept: usize,
    footprint: Footprint,
    /// Largest micro-batch of this data that would fit, in records.
    most_records: Option<usize>,
    /// The largest micro-batch of the smallest size.
    smallest: Workload,
    /// Micro-batches of the whole run.
    micro_batches: f64,
    /// Of the whole run.
    total: Workload,
    steps: u64,
}

impl Outlook {
    fn new(recipe: &Recipe, sized: &Settled, memory: MemoryPlan, budget: Option<(u64, String)>) -> Self {
        let memory = match &budget {
            Some((budget, _)) => memory.within(*budget),
            None => memory,
        };
        let (data, shapes) = (&sized.data, memory.shapes());
        let plan = Plan::new(&recipe.train, recipe.data.order, data.mixture.clone());
        let largest = Workload::from(&plan.largest_micro_batch(&data.train, sized.micro_batches));
        let kept = memory.kept(largest);
        let of_size = |size| recipe.micro_batches(size, data.max_seq_len);
        let most_records = memory.largest_micro_batch(&plan, &data.train, recipe.train.batch_size, of_size);
        let rows = plan.epoch_rows(0);
        let rows = rows.into_iter().filter_map(|row| data.train.get(row));
        let (tokens, supervised) =
            rows.fold((0, 0), |sum, row| (sum.0 + row.tokens(), sum.1 + row.supervised()));
        let epochs = plan.epoch(plan.total_steps);
        // Steps differ little: a hundred tell how many micro-batches they have.
        let looked_at = plan.total_steps.min(100);
        let batches = |step| plan.micro_batches(step, &data.train, sized.micro_batches).len();
        let found: usize = (0..looked_at).map(batches).sum();
        let over = |n: usize| (n as f64 * epochs) as usize;
        Self {
            footprint: shapes.footprint(largest, kept),
            total: Workload { tokens: over(tokens), supervised: over(supervised), pairs: 0 },
            steps: plan.total_steps,
            micro_batches: found as f64 * plan.total_steps as f64 / looked_at.max(1) as f64,
            smallest: (&plan.largest_micro_batch(&data.train, of_size(1))).into(),
            memory,
            budget,
            largest,
            kept,
            most_records,
        }
    }

    fn table(&self, recipe: &Recipe) -> String {
        let Footprint {
            weights,
            streamed,
            adapter,
            optimizer,
            saved_inputs,
            kept_graphs,
            block_graph,
            logits,
            save,
            step,
            dense,
            start,
            program,
        } = self.footprint;
        let rows = [
            (if streamed { "weights (one block of them)" } else { "weights" }, weights),
            ("adapter", adapter),
            ("gradients and optimizer", optimizer),
            ("saved block inputs", saved_inputs),
            ("kept graphs", kept_graphs),
            ("one block's graph, and its gradients", block_graph),
            ("or: logits", logits),
            ("the program", program),
        ];
        let rare = [
            ("or: the optimizer's step, or a save", step),
            ("or: decomposing weights before step 1", start),
            ("a save being written", save),
            ("one dense matrix", dense),
        ];
        let rare = rare.into_iter().filter(|(_, bytes)| *bytes > 0);
        let mut text = format!(
            "the largest micro-batch: {} tokens, {} learned; {} blocks keep their graphs\n\n",
            self.largest.tokens, self.largest.supervised, self.kept
        );
        for (what, bytes) in rows.into_iter().chain(rare) {
            let _ = writeln!(text, "{what:<38}{:>12}", size(bytes));
        }
        let _ = writeln!(text, "{:<38}{:>12}", "peak", size(self.footprint.peak()));
        if let Some((budget, whose)) = &self.budget {
            let _ = writeln!(text, "{whose:<38}{:>12}", size(*budget));
            let most = match self.most_records {
                Some(n) if n == recipe.train.batch_size => format!("{n} (the whole batch)"),
                Some(n) => n.to_string(),
                None => "none".into(),
            };
            let _ = writeln!(text, "{:<38}{most:>12}", "largest micro-batch that fits");
        }
        text
    }

    /// Seconds of the run, as fast as this machine multiplies now.
    fn seconds_here(&self, recipe: &Recipe) -> f64 {
        let precision = recipe.base.load_config().precision;
        let device = open_device("cpu").or_else(|_| open_device("tch:cpu")).ok();
        let speed = device.and_then(|device| operations_per_second(&device, precision, TOKENS, 2));
        self.operations() / (speed.unwrap_or(f64::NAN) * SHARE_OF_PRODUCTS)
    }

    /// Seconds of the run on a card: of its operations, or of reading the weights, forwards, again and
    /// backwards, in every micro-batch.
    fn seconds_on(&self, card: Card) -> f64 {
        let layers = self.memory.shapes().layers();
        let passes = 2.0 + layers.saturating_sub(self.kept) as f64 / layers.max(1) as f64;
        let bytes = self.micro_batches * passes * self.footprint.weights as f64;
        card.seconds(self.operations(), bytes)
    }

    fn operations(&self) -> f64 {
        self.memory.shapes().operations(self.total, self.kept)
    }

    /// What the run takes if it takes so many seconds.
    fn cost(&self, whose: &str, seconds: f64, price: Option<f64>) -> String {
        let speed = format!("tokens a second, {whose}");
        let mut text = format!(
            "\n{speed:<38}{:>12.0}\n{:<38}{:>12}\n{:<38}{:>12.2}\n",
            self.total.tokens as f64 / seconds,
            "steps",
            self.steps,
            "hours",
            seconds / 3600.0,
        );
        if let Some(price) = price {
            let _ = writeln!(text, "{:<38}{:>12.2}", "dollars", price * seconds / 3600.0);
        }
        text
    }

    /// Changes that make it smaller, with what each would come to.
    fn advice(&self, recipe: &Recipe, opened: &OpenedBase, memory: Memory) -> String {
        let (quantize, weights) = (recipe.base.quantize, recipe.base.weights);
        let inputs = recipe.train.saved_inputs;
        let (nf4, streamed) = (Quantize::Nf4, Residency::Streamed);
        let changes = [
            ("base.quantize = \"nf4\"", nf4, weights, inputs, self.largest),
            ("base.weights = \"streamed\"", quantize, streamed, inputs, self.largest),
            ("both", nf4, streamed, inputs, self.largest),
            ("train.recompute = \"blocks\"", quantize, weights, inputs, self.largest),
            ("train.saved_inputs = \"bf16\"", quantize, weights, SavedInputs::Bf16, self.largest),
            ("train.saved_inputs = \"host\"", quantize, weights, SavedInputs::Host, self.largest),
            ("train.micro_batch_size = 1", quantize, weights, inputs, self.smallest),
        ];
        let mut text = String::from("\nwhat to change:\n");
        for (name, quantize, weights, inputs, work) in changes {
            let Ok(shapes) = shapes(recipe, opened, (quantize, weights), memory) else { continue };
            let peak = shapes.saving(inputs).footprint(work, 0).peak();
            if peak < self.footprint.peak() {
                let _ = writeln!(text, "{name:<38}{:>12}", size(peak));
            }
        }
        if let Some(longest) = self.memory.longest_row(opened.base.config.max_position_embeddings) {
            let _ = writeln!(text, "{:<38}{longest:>12}", "longest row that would fit, in tokens");
        }
        text
    }
}

fn size(bytes: u64) -> String {
    format!("{:.2} GB", bytes as f64 / 1e9)
}
