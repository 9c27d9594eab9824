use std::fmt::Write;
use std::path::Path;
use std::time::Instant;

use bytes::Bytes;
use miette::{IntoDiagnostic, Result, miette};
use pronk_data::PreparedDataset;
use pronk_kernels::{Format, FrozenMatrix, Precision};
use pronk_model::{LoadConfig, Residency, Scheme, WeightBytes};
use pronk_train::{Footprint, Plan, Recompute, Shapes, Workload, available_memory_bytes};

use super::prep;
use crate::args;
use crate::base::{self, OpenedBase};
use crate::recipe::{Quantize, Recipe};
use crate::terminal::print;

/// Cards by name with their memory in GB, from their makers' data sheets.
const CARDS: [(&str, u64); 12] = [
    ("rtx3060", 12),
    ("rtx3090", 24),
    ("rtx4060", 8),
    ("rtx4070", 12),
    ("rtx4080", 16),
    ("rtx4090", 24),
    ("rtx5080", 16),
    ("rtx5090", 32),
    ("l4", 24),
    ("a100", 80),
    ("h100", 80),
    ("h200", 141),
];

/// Of a step's time, about the share that goes into products with the base, by a profile of SmolLM2's.
const SHARE_OF_PRODUCTS: f64 = 0.7;

/// `pronk plan`
pub fn run(args: &args::Plan) -> Result<()> {
    let recipe = Recipe::read(&args.recipe, &args.set)?;
    if let Some(price) = args.price.filter(|price| !price.is_finite() || *price < 0.0) {
        return Err(miette!("--price: expected dollars an hour, a number from 0, found {price}"));
    }
    let budget = budget(args.gpu.as_deref(), &recipe)?;
    let opened = base::open(&recipe.base.path, Path::new("."))?;
    let data = prep::with_bar(&recipe.prepare_config(), &opened)?;
    if data.train.is_empty() {
        return Err(miette!("no rows to train on: every record was dropped or held out"));
    }
    let outlook = Outlook::new(&recipe, &opened, &data, budget)?;
    print(&outlook.table(&recipe));
    if args.gpu.is_none() {
        print(&outlook.time(&recipe, args.price));
    } else {
        print("time and cost: not told for another machine; run `pronk plan` there\n");
    }
    match &outlook.budget {
        Some((budget, whose)) if outlook.footprint.peak() > *budget => {
            print(&outlook.advice(&recipe, &opened));
            Err(miette!("{} do not fit in {whose}, {}", size(outlook.footprint.peak()), size(*budget)))
        }
        _ => Ok(()),
    }
}

/// What the run is held against, and whose word that is.
fn budget(gpu: Option<&str>, recipe: &Recipe) -> Result<Option<(u64, String)>> {
    if let Some(name) = gpu {
        let card = CARDS.iter().find(|(card, _)| card.eq_ignore_ascii_case(name));
        let names = || CARDS.map(|(card, _)| card).join(", ");
        let (card, gigabytes) =
            card.ok_or_else(|| miette!("--gpu {name}: unknown; there are: {}", names()))?;
        return Ok(Some((gigabytes * 1_000_000_000, format!("the memory of the {card}"))));
    }
    if let Some(budget) = recipe.train.memory_budget {
        return Ok(Some((budget.as_u64(), "train.memory_budget".into())));
    }
    Ok(available_memory_bytes().map(|free| (free, "the memory that is free here".into())))
}

/// A run, as far as it can be told from shapes and rows.
struct Outlook {
    shapes: Shapes,
    budget: Option<(u64, String)>,
    largest: Workload,
    kept: usize,
    footprint: Footprint,
    /// Largest micro-batch of this data that would fit, in records.
    most_records: Option<usize>,
    /// Of the whole run.
    total: Workload,
    steps: u64,
}

impl Outlook {
    fn new(
        recipe: &Recipe,
        opened: &OpenedBase,
        data: &PreparedDataset,
        budget: Option<(u64, String)>,
    ) -> Result<Self> {
        let shapes = shapes(recipe, opened, recipe.base.quantize, recipe.base.weights)?;
        let plan = Plan::new(&recipe.train, recipe.data.order, data.train.len());
        let work = |records| Workload::from(&plan.largest_micro_batch(&data.train, records));
        let limit = budget.as_ref().map(|(budget, _)| *budget);
        let largest = work(recipe.train.micro_batch_size);
        let kept = shapes.kept(recipe.train.recompute, largest, limit);
        let fits = |records: &usize| {
            limit.is_some_and(|limit| shapes.blocks_that_fit(work(*records), limit).is_ok())
        };
        let most_records = (1..=recipe.train.batch_size).rev().find(fits);
        let rows = data.train.iter();
        let (tokens, supervised) =
            rows.fold((0, 0), |sum, row| (sum.0 + row.tokens(), sum.1 + row.supervised()));
        let epochs = plan.epoch(plan.total_steps);
        let over = |n: usize| (n as f64 * epochs) as usize;
        Ok(Self {
            footprint: shapes.footprint(largest, kept),
            total: Workload { tokens: over(tokens), supervised: over(supervised) },
            steps: plan.total_steps,
            shapes,
            budget,
            largest,
            kept,
            most_records,
        })
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
        let mut text = format!(
            "the largest micro-batch: {} tokens, {} learned; {} blocks keep their graphs\n\n",
            self.largest.tokens, self.largest.supervised, self.kept
        );
        for (what, bytes) in rows {
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

    /// Speed as this machine multiplies now, and what it makes of the recipe's steps.
    fn time(&self, recipe: &Recipe, price: Option<f64>) -> String {
        let precision = recipe.base.load_config().precision;
        let speed = operations_per_second(precision) * SHARE_OF_PRODUCTS;
        let seconds = self.shapes.operations(self.total, self.kept) / speed;
        let mut text = format!(
            "\n{:<38}{:>12.0}\n{:<38}{:>12}\n{:<38}{:>12.2}\n",
            "tokens a second, expected here",
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
    fn advice(&self, recipe: &Recipe, opened: &OpenedBase) -> String {
        let mut text = String::from("\nwhat to change:\n");
        let here = (recipe.base.quantize, recipe.base.weights);
        let changes = [
            ("base.quantize = \"nf4\"", (Quantize::Nf4, here.1)),
            ("base.weights = \"streamed\"", (here.0, Residency::Streamed)),
            ("both", (Quantize::Nf4, Residency::Streamed)),
        ];
        for (name, (quantize, weights)) in changes {
            let Ok(shapes) = shapes(recipe, opened, quantize, weights) else { continue };
            let peak = shapes.footprint(self.largest, 0).peak();
            if peak < self.footprint.peak() {
                let _ = writeln!(text, "{name:<38}{:>12}", size(peak));
            }
        }
        if recipe.train.recompute == Recompute::None {
            let peak = self.shapes.footprint(self.largest, 0).peak();
            let _ = writeln!(text, "{:<38}{:>12}", "train.recompute = \"blocks\"", size(peak));
        }
        let _ = writeln!(text, "or a smaller train.micro_batch_size or data.max_seq_len");
        text
    }
}

fn shapes(recipe: &Recipe, opened: &OpenedBase, quantize: Quantize, weights: Residency) -> Result<Shapes> {
    let format = quantize.scheme().map(Scheme::format);
    let config = LoadConfig { weights, ..recipe.base.load_config() };
    let bytes = WeightBytes::of(&opened.base, config, format).into_diagnostic()?;
    Shapes::new(&opened.base.config, bytes, &recipe.lora.config).into_diagnostic()
}

/// How fast this machine multiplies 512 tokens with a matrix of a 7B's size, right now.
fn operations_per_second(precision: Precision) -> f64 {
    const SIDE: usize = 4096;
    const TOKENS: usize = 512;
    let zeros = Bytes::from(vec![0; Format::Bf16.bytes_for(SIDE, SIDE)]);
    let Ok(matrix) = FrozenMatrix::dense(Format::Bf16, [SIDE, SIDE], zeros) else { return f64::NAN };
    let x = vec![0.0; TOKENS * SIDE];
    let once = || {
        let started = Instant::now();
        let y = matrix.forward(&x, precision);
        let dx = matrix.backward(&y, precision);
        let operations = 2.0 * (2 * TOKENS * SIDE * SIDE) as f64;
        operations * f64::from(u8::from(!dx.is_empty())) / started.elapsed().as_secs_f64()
    };
    let _warm = once();
    once().max(once())
}

fn size(bytes: u64) -> String {
    format!("{:.2} GB", bytes as f64 / 1e9)
}
