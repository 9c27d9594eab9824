//! How much memory a micro-batch takes, by what takes it, from shapes alone.
//!
//! The same account decides how many blocks keep their graphs while training, and fills the table
//! of `pronk plan`. It counts what is alive at the worst moment of a step; `BENCHMARKS.md` holds it
//! against what was measured.

use std::collections::BTreeSet;

use pronk_data::PackedBatch;
use pronk_kernels::logit_rows;
use pronk_lora::{LoraConfig, LoraError};
use pronk_model::{DecoderConfig, WeightBytes};

use crate::Recompute;

/// Bytes of a float32.
const FLOAT: u64 = 4;
/// The program itself, its threads' stacks and scratch, the tokenizer, a page or two of everything.
const PROGRAM: u64 = 70 << 20;

/// What a micro-batch brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Workload {
    /// Tokens in all its records.
    pub tokens: usize,
    /// Tokens that are learned.
    pub supervised: usize,
}

impl From<&PackedBatch> for Workload {
    fn from(batch: &PackedBatch) -> Self {
        Self { tokens: batch.tokens(), supervised: batch.supervised() }
    }
}

/// Bytes in the memory that computes, by what takes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Footprint {
    /// The base: all of it, or the block at hand where it is streamed.
    pub weights: u64,
    /// Whether the weights are gone while there are logits.
    pub streamed: bool,
    /// Both factors of every adapted layer.
    pub adapter: u64,
    /// Gradients and both of `AdamW`'s moments.
    pub optimizer: u64,
    /// Inputs of the blocks that will run again.
    pub saved_inputs: u64,
    /// Graphs of the blocks that will not.
    pub kept_graphs: u64,
    /// The graph of the block at hand and what its backward pass needs beside it.
    pub block_graph: u64,
    /// A chunk of logits, and the head that makes them.
    pub logits: u64,
    /// The program.
    pub program: u64,
}

impl Footprint {
    /// At the worst moment: blocks and logits never need their memory at once.
    pub fn peak(&self) -> u64 {
        let always = self.adapter + self.optimizer + self.saved_inputs + self.kept_graphs + self.program;
        let in_a_block = self.weights + self.block_graph;
        let at_the_end = self.logits + if self.streamed { 0 } else { self.weights };
        always + in_a_block.max(at_the_end)
    }
}

/// What the memory of a run depends on beside its micro-batches.
#[derive(Debug, Clone, PartialEq)]
pub struct Shapes {
    model: DecoderConfig,
    weights: WeightBytes,
    /// Last parts of the names of adapted layers, such as `q_proj`.
    adapted: BTreeSet<String>,
    /// Numbers in the adapter.
    adapter_numbers: u64,
}

impl Shapes {
    /// Of an adapter as `lora` describes it, on a decoder whose weights take `weights`.
    pub fn new(model: &DecoderConfig, weights: WeightBytes, lora: &LoraConfig) -> Result<Self, LoraError> {
        let modules = model.linear_modules();
        let targets = lora.target_modules.select(&modules)?;
        let numbers = targets.iter().map(|m| lora.rank * (m.in_features + m.out_features));
        let short = |name: &str| name.rsplit('.').next().unwrap_or(name).to_owned();
        Ok(Self {
            model: model.clone(),
            weights,
            adapter_numbers: numbers.sum::<usize>() as u64,
            adapted: targets.iter().map(|m| short(&m.name)).collect(),
        })
    }

    /// The account of one micro-batch when the last `kept` blocks keep their graphs.
    pub fn footprint(&self, work: Workload, kept: usize) -> Footprint {
        let layers = self.model.num_hidden_layers;
        let kept = kept.min(layers);
        let numbers = self.adapter_numbers * FLOAT;
        let tokens = work.tokens as u64;
        let input = tokens * self.model.hidden_size as u64 * FLOAT;
        Footprint {
            weights: self.weights.resident,
            streamed: self.weights.streamed_head > 0,
            adapter: numbers,
            optimizer: 3 * numbers,
            saved_inputs: (layers - kept) as u64 * input,
            kept_graphs: kept as u64 * self.graph(tokens),
            block_graph: self.graph(tokens) + self.backward(tokens),
            logits: self.logits(work),
            program: PROGRAM,
        }
    }

    /// How many blocks keep their graphs while `work` goes through. Where nobody tells a budget,
    /// "auto" keeps none.
    pub fn kept(&self, recompute: Recompute, work: Workload, budget: Option<u64>) -> usize {
        match (recompute, budget) {
            (Recompute::None, _) => self.model.num_hidden_layers,
            (Recompute::Blocks, _) | (Recompute::Auto, None) => 0,
            (Recompute::Auto, Some(budget)) => self.blocks_that_fit(work, budget).unwrap_or(0),
        }
    }

    /// How many blocks can keep their graphs within `budget` bytes, or, where not even none can,
    /// the smallest budget that would do.
    pub fn blocks_that_fit(&self, work: Workload, budget: u64) -> Result<usize, u64> {
        let layers = self.model.num_hidden_layers;
        let fits = |kept: &usize| self.footprint(work, *kept).peak() <= budget;
        (0..=layers).rev().find(fits).ok_or_else(|| self.footprint(work, 0).peak())
    }

    /// Multiplications and additions of one step over `work`, when the last `kept` blocks keep their
    /// graphs: forwards, again where a block runs again, and backwards to the inputs. The base gets
    /// no gradient, and an adapter's own products are too few to count.
    pub fn operations(&self, work: Workload, kept: usize) -> f64 {
        let model = &self.model;
        let linear: usize = model.linear_modules().iter().map(|m| m.in_features * m.out_features).sum();
        let layers = model.num_hidden_layers;
        let again = (layers - kept.min(layers)) as f64 / layers.max(1) as f64;
        let head = (2 * model.vocab_size * model.hidden_size * work.supervised) as f64;
        2.0 * ((2.0 + again) * (linear * work.tokens) as f64 + head)
    }

    /// What autodiff keeps of one block: the inputs of the operations that are not linear, and of
    /// the linear layers with an adapter. A frozen product keeps nothing.
    fn graph(&self, tokens: u64) -> u64 {
        let model = &self.model;
        let hidden = model.hidden_size;
        let q = model.num_attention_heads * model.head_dim;
        let kv = model.num_key_value_heads * model.head_dim;
        let adapted = |names: &[&str]| usize::from(names.iter().any(|&name| self.adapted.contains(name)));
        let attention = hidden * (1 + adapted(&["q_proj", "k_proj", "v_proj"])) // the norm's input and output
            + 2 * q + 2 * kv; // q, k, v and the result
        let feed_forward = hidden * (1 + adapted(&["gate_proj", "up_proj"]))
            + model.intermediate_size * (2 + adapted(&["down_proj"])); // gate, up, their product
        tokens * (attention + feed_forward) as u64 * FLOAT
    }

    /// What the backward pass of a block holds beside its graph: the gradients of the widest layer.
    fn backward(&self, tokens: u64) -> u64 {
        tokens * (3 * self.model.intermediate_size + 2 * self.model.hidden_size) as u64 * FLOAT
    }

    /// The head where it is not in memory anyway, and two copies of a chunk's logits.
    fn logits(&self, work: Workload) -> u64 {
        let rows = logit_rows(self.model.vocab_size).min(work.supervised.max(1)) as u64;
        let hidden = 3 * work.supervised as u64 * self.model.hidden_size as u64;
        (2 * rows * self.model.vocab_size as u64 + hidden) * FLOAT + self.weights.streamed_head
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shapes() -> Shapes {
        let config = r#"{"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4,
            "num_attention_heads": 4, "model_type": "llama"}"#;
        let model = DecoderConfig::from_json(config.as_bytes()).unwrap();
        let weights = WeightBytes { resident: 1 << 20, streamed_head: 0 };
        Shapes::new(&model, weights, &LoraConfig::default()).unwrap()
    }

    #[test]
    fn a_larger_budget_keeps_more_graphs_and_a_smaller_one_says_what_would_do() {
        let (shapes, work) = (shapes(), Workload { tokens: 10_000, supervised: 5_000 });
        let least = shapes.footprint(work, 0).peak();
        let most = shapes.footprint(work, 4).peak();
        assert_eq!(shapes.blocks_that_fit(work, least), Ok(0));
        assert_eq!(shapes.blocks_that_fit(work, most), Ok(4));
        assert_eq!(shapes.blocks_that_fit(work, most - 1), Ok(3));
        assert_eq!(shapes.blocks_that_fit(work, least - 1), Err(least));
    }

    #[test]
    fn more_adapted_layers_keep_more() {
        let mut all = shapes();
        let work = Workload { tokens: 100, supervised: 50 };
        let few = all.footprint(work, 4).kept_graphs;
        all.adapted.extend(["gate_proj", "down_proj"].map(str::to_owned));
        assert_eq!(all.footprint(work, 4).kept_graphs - few, 4 * 100 * (64 + 256) * FLOAT);
    }
}
