//! How much memory a micro-batch takes, by what takes it, from shapes alone.
//!
//! The same account decides how many blocks keep their graphs while training, and fills the table
//! of `pronk plan`. It counts what is alive at the worst moment of a step; `BENCHMARKS.md` holds it
//! against what was measured.

use std::collections::{BTreeMap, BTreeSet};

use pronk_data::PackedBatch;
use pronk_kernels::{Precision, attention_bytes_on_card, logit_rows};
use pronk_lora::{EMBED_TOKENS, LM_HEAD, LoraConfig, LoraError, TensorKind, TensorName};
use pronk_model::{DecoderConfig, Memory, WeightBytes, start_bytes};

use crate::{OptimizerKind, Recompute, SavedInputs};

/// Bytes of a float32.
const FLOAT: u64 = 4;
/// The program itself, its threads' stacks and scratch, the tokenizer, a page or two of everything.
const PROGRAM: u64 = 70 << 20;
/// What a card holds for the program: the driver's context and the compiled kernels. An estimate, from what
/// nvidia-smi shows for processes that have allocated nothing yet.
const CONTEXT: u64 = 500 << 20;
/// About how many bytes of a save are written, synced and read back in a second.
const SAVED_A_SECOND: f64 = 200e6;
/// Operations that a fast processor does in the same time: on a slower one a step lasts longer, and a save is over sooner.
const DONE_A_SECOND: f64 = 1e12;

/// What a micro-batch brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Workload {
    /// Tokens in all its records.
    pub tokens: usize,
    /// Tokens that are learned.
    pub supervised: usize,
    /// Pairs of tokens of the same record.
    pub pairs: usize,
}

impl From<&PackedBatch> for Workload {
    fn from(batch: &PackedBatch) -> Self {
        let records = batch.document_ids.chunk_by(|a, b| a == b);
        let pairs = records.map(|record| record.len() * record.len()).sum();
        Self { tokens: batch.tokens(), supervised: batch.supervised(), pairs }
    }
}

/// Bytes in the memory that computes, by what takes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Footprint {
    /// The base: all of it, or the block at hand where it is streamed.
    pub weights: u64,
    /// Whether the weights are gone while there are logits.
    pub streamed: bool,
    /// Both factors of every adapted layer, what is fixed beside them, and what is trained whole.
    pub adapter: u64,
    /// Gradients, and what the optimizer remembers.
    pub optimizer: u64,
    /// Inputs of the blocks that will run again.
    pub saved_inputs: u64,
    /// Graphs of the blocks that will not.
    pub kept_graphs: u64,
    /// The graph of the block at hand and what its backward pass needs beside it.
    pub block_graph: u64,
    /// A chunk of logits, the head that makes them, and its gradient by them.
    pub logits: u64,
    /// A save that is still being written at the next step's worst moment, in the host's memory.
    pub save: u64,
    /// What a step of the optimizer computes in, or what a save is put together in.
    pub step: u64,
    /// The matrix that is dense for its product, on a card.
    pub dense: u64,
    /// What the adapter's first values are computed in, before the first step, where weights are decomposed for them.
    pub start: u64,
    /// The program.
    pub program: u64,
}

impl Footprint {
    /// At the worst moment: blocks and logits never need their memory at once, and none of both what comes before them.
    pub fn peak(&self) -> u64 {
        let run = self.adapter + self.optimizer + self.saved_inputs + self.kept_graphs;
        let always = run + self.save + self.dense + self.program;
        let in_a_block = self.weights + self.block_graph;
        // What the graphs have left free is hardly ever there in one piece for what comes behind them.
        let behind = self.logits.max(self.step) + if self.streamed { 0 } else { self.weights };
        (always + in_a_block.max(behind)).max(self.weights + self.start + self.adapter + self.program)
    }
}

/// What the memory of a run depends on beside its micro-batches.
#[derive(Debug, Clone, PartialEq)]
pub struct Shapes {
    model: DecoderConfig,
    weights: WeightBytes,
    /// Last parts of the names of adapted layers, such as `q_proj`.
    adapted: BTreeSet<String>,
    /// Outputs of a block's layers with `DoRA`, which are kept in front of their magnitudes.
    dora_outputs: usize,
    /// Numbers that are fixed beside the adapter, and bytes that they take.
    fixed_numbers: u64,
    fixed_bytes: u64,
    /// Bytes that it is started in.
    start: u64,
    /// Numbers in the linear layers of all blocks.
    linear_numbers: usize,
    /// Numbers in the adapter.
    adapter_numbers: u64,
    /// Numbers in the embeddings, and in the head, where they are trained whole.
    embedding_numbers: u64,
    head_numbers: u64,
    /// Numbers of all that is trained whole; and in a file, which has what is tied twice.
    whole_numbers: u64,
    whole_in_file: u64,
    /// Bytes that a number of a saved block input takes.
    saved_bytes: u64,
    /// Bytes that the optimizer remembers of a number.
    state_bytes: u64,
    /// Copies of a tensor that a step of it makes on its way.
    step_copies: u64,
}

impl Shapes {
    /// Of an adapter as `lora` describes it, on a decoder whose weights take `weights`; `model` has the vocabulary that
    /// it is trained with.
    pub fn new(model: &DecoderConfig, weights: WeightBytes, lora: &LoraConfig) -> Result<Self, LoraError> {
        let modules = model.adapter_modules();
        let targets = lora.select(&modules)?;
        let magnitudes = |outputs: usize| if lora.use_dora { outputs } else { 0 };
        let numbers = targets
            .iter()
            .map(|m| lora.rank_of(&m.name) * (m.in_features + m.out_features) + magnitudes(m.out_features));
        let fixed_numbers: usize =
            targets.iter().map(|m| lora.fixed_rank_of(m) * (m.in_features + m.out_features)).sum();
        let is_short = lora.restore_rank > 0 && weights.precision == Precision::Bf16;
        let size_of_fixed = if is_short { size_of::<u16>() } else { size_of::<f32>() };
        let whole = lora.whole(&modules)?;
        let whole_numbers: usize = whole.values().map(|[rows, columns]| rows * columns).sum();
        let weight = |module| {
            let shape = whole.get(&TensorName::new(module, TensorKind::Weight));
            shape.map_or(0, |[rows, columns]| (rows * columns) as u64)
        };
        let (embedding_numbers, head_numbers) = (weight(EMBED_TOKENS), weight(LM_HEAD));
        let is_tied = lora.ensure_weight_tying && model.tie_word_embeddings;
        let short = |name: &str| name.rsplit('.').next().unwrap_or(name).to_owned();
        let outputs: BTreeMap<String, usize> =
            targets.iter().map(|m| (short(&m.name), m.out_features)).collect();
        Ok(Self {
            model: model.clone(),
            weights,
            // Dropout has the base multiplied with what it leaves as well.
            dora_outputs: magnitudes(outputs.values().sum()) * if lora.dropout > 0.0 { 2 } else { 1 },
            fixed_numbers: fixed_numbers as u64,
            fixed_bytes: (fixed_numbers * size_of_fixed) as u64,
            start: start_bytes(model, lora, &targets) as u64,
            linear_numbers: model.linear_modules().iter().map(|m| m.in_features * m.out_features).sum(),
            adapter_numbers: (numbers.sum::<usize>() + whole_numbers) as u64,
            embedding_numbers,
            whole_numbers: whole_numbers as u64,
            whole_in_file: whole_numbers as u64 + if is_tied { embedding_numbers } else { 0 },
            head_numbers: if is_tied { embedding_numbers } else { head_numbers },
            adapted: targets.iter().map(|m| short(&m.name)).collect(),
            saved_bytes: FLOAT,
            state_bytes: OptimizerKind::default().state_bytes(),
            step_copies: OptimizerKind::default().step_copies(),
        })
    }

    /// The same with another optimizer.
    #[must_use]
    pub fn stepping(self, optimizer: OptimizerKind) -> Self {
        let (state_bytes, step_copies) = (optimizer.state_bytes(), optimizer.step_copies());
        Self { state_bytes, step_copies, ..self }
    }

    /// The same where the inputs of blocks that run again are kept in another way.
    #[must_use]
    pub fn saving(self, inputs: SavedInputs) -> Self {
        Self { saved_bytes: inputs.bytes_per_number(!self.on_card()), ..self }
    }

    /// Blocks of the decoder.
    pub fn layers(&self) -> usize {
        self.model.num_hidden_layers
    }

    /// The account of one micro-batch when the last `kept` blocks keep their graphs.
    pub fn footprint(&self, work: Workload, kept: usize) -> Footprint {
        let layers = self.model.num_hidden_layers;
        let kept = kept.min(layers);
        let numbers = self.adapter_numbers * FLOAT;
        let in_file =
            (self.adapter_numbers - self.whole_numbers + self.whole_in_file + self.fixed_numbers) * FLOAT;
        let states = self.adapter_numbers * self.state_bytes;
        let whole_file = self.whole_in_file * FLOAT + self.whole_numbers * self.state_bytes;
        // What is fixed and what is trained, as one.
        let put_together = if self.fixed_numbers > 0 { in_file } else { 0 };
        let largest = self.embedding_numbers.max(self.head_numbers) * FLOAT;
        let tokens = work.tokens as u64;
        let input = tokens * self.model.hidden_size as u64 * self.saved_bytes;
        Footprint {
            weights: self.weights.resident,
            streamed: self.weights.streamed_head > 0,
            adapter: numbers + self.fixed_bytes,
            optimizer: numbers + states,
            saved_inputs: (layers - kept) as u64 * input,
            kept_graphs: kept as u64 * self.graph(work),
            block_graph: self.graph(work) + self.backward(work),
            logits: self.logits(work),
            // The adapter to use and the checkpoint's.
            save: self.save(2 * in_file + states, self.operations(work, kept)),
            step: (self.step_copies * largest).max(whole_file).max(put_together),
            dense: self.weights.dense,
            start: self.start,
            program: if self.on_card() { CONTEXT } else { PROGRAM },
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
        let layers = model.num_hidden_layers;
        let again = (layers - kept.min(layers)) as f64 / layers.max(1) as f64;
        let head = (2 * model.vocab_size * model.hidden_size * work.supervised) as f64;
        2.0 * ((2.0 + again) * (self.linear_numbers * work.tokens) as f64 + head)
    }

    /// Whether it computes in the memory of a graphics card.
    pub fn on_card(&self) -> bool {
        self.weights.memory == Memory::Card
    }

    /// What of a save, the adapter to use and a checkpoint, is in the way of a step of so many operations: a small one is
    /// written before that keeps much.
    fn save(&self, bytes: u64, operations: f64) -> u64 {
        let outlasts = bytes as f64 / SAVED_A_SECOND > operations / DONE_A_SECOND / 2.0;
        if outlasts && !self.on_card() { bytes } else { 0 }
    }

    /// What autodiff keeps of one block: the inputs of the operations that are not linear, and of
    /// the linear layers with an adapter. A frozen product keeps nothing.
    fn graph(&self, work: Workload) -> u64 {
        let model = &self.model;
        let hidden = model.hidden_size;
        let [q, kv] = model.attention_widths();
        let adapted = |names: &[&str]| usize::from(names.iter().any(|&name| self.adapted.contains(name)));
        let attention = hidden * (1 + adapted(&["q_proj", "k_proj", "v_proj", "qkv_proj"])) // the norm's input and output
            + 2 * q + 2 * kv; // q, k, v and the result
        let feed_forward = hidden * (1 + adapted(&["gate_proj", "up_proj", "gate_up_proj"]))
            + model.intermediate_size * (self.gates() + adapted(&["down_proj"])); // gate, up, what they become
        let norms = hidden * model.norms_of_outputs() + if model.norms_heads() { q + kv } else { 0 };
        (work.tokens * (attention + feed_forward + norms + self.dora_outputs)) as u64 * FLOAT
    }

    /// Numbers of a float32's size that are kept of a gate and what it gates.
    fn gates(&self) -> usize {
        if self.weights.memory == Memory::Host && self.weights.precision.is_bf16_here() { 1 } else { 2 }
    }

    /// What the backward pass of a block holds beside its graph: the gradients of the widest layer, those of its gates
    /// as they are kept themselves, and on a card scores of attention. A feed-forward in one operation has the latter alone.
    fn backward(&self, work: Workload) -> u64 {
        let one = self.gates() == 1
            && !["gate_proj", "up_proj", "down_proj"].iter().any(|&name| self.adapted.contains(name));
        let intermediate = (usize::from(!one) + self.gates()) * self.model.intermediate_size;
        let numbers = work.tokens * (intermediate + 2 * self.model.hidden_size);
        let heads = self.model.num_attention_heads;
        let scores = if self.on_card() { attention_bytes_on_card(heads, work.pairs) } else { 0 };
        numbers as u64 * FLOAT + scores as u64
    }

    /// The head where it is not in memory anyway, and two copies of a chunk's logits; a third, and
    /// one more on the way, where they are capped.
    fn logits(&self, work: Workload) -> u64 {
        let rows = logit_rows(self.model.vocab_size).min(work.supervised.max(1)) as u64;
        let hidden = 3 * work.supervised as u64 * self.model.hidden_size as u64;
        let copies = if self.model.final_logit_softcapping.is_some() { 4 } else { 2 };
        let numbers = copies * rows * self.model.vocab_size as u64 + hidden + self.head_numbers;
        numbers * FLOAT + self.weights.streamed_head
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use pronk_kernels::Precision;
    use pronk_lora::InitLoraWeights;

    use super::*;

    pub(crate) fn shapes() -> Shapes {
        shapes_of(&LoraConfig::default())
    }

    fn shapes_of(lora: &LoraConfig) -> Shapes {
        let config = r#"{"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4,
            "num_attention_heads": 4, "model_type": "llama"}"#;
        let model = DecoderConfig::from_json(config.as_bytes()).unwrap();
        Shapes::new(&model, weights(Precision::F32), lora).unwrap()
    }

    fn weights(precision: Precision) -> WeightBytes {
        WeightBytes { memory: Memory::Host, precision, resident: 1 << 20, streamed_head: 0, dense: 0 }
    }

    #[test]
    fn what_comes_before_the_first_step_counts_where_it_is_more() {
        let (small, large) = (1, 1 << 20);
        let peak = |init_lora_weights, restore_rank, tokens| {
            let lora = LoraConfig { init_lora_weights, restore_rank, ..LoraConfig::default() };
            let work = Workload { tokens, supervised: tokens, pairs: 0 };
            shapes_of(&lora).footprint(work, 0).peak()
        };
        let (plain, qera) = (InitLoraWeights::Default, InitLoraWeights::Qera);
        let records = 128 * 256 * 64 * FLOAT;
        assert!(peak(qera, 0, small) > peak(plain, 0, small) + records);
        assert_eq!(peak(qera, 0, large), peak(plain, 0, large));
        // Of four blocks' two modules, 64 by 64.
        let fixed = 4 * 2 * 5 * (64 + 64) * FLOAT;
        assert_eq!(peak(plain, 5, small), peak(qera, 0, small) + fixed);
        assert_eq!(peak(plain, 5, large), peak(plain, 0, large) + fixed);
    }

    #[test]
    fn a_larger_budget_keeps_more_graphs_and_a_smaller_one_says_what_would_do() {
        let (shapes, work) = (shapes(), Workload { tokens: 10_000, supervised: 5_000, pairs: 1_000_000 });
        let least = shapes.footprint(work, 0).peak();
        let most = shapes.footprint(work, 4).peak();
        assert_eq!(shapes.blocks_that_fit(work, least), Ok(0));
        assert_eq!(shapes.blocks_that_fit(work, most), Ok(4));
        assert_eq!(shapes.blocks_that_fit(work, most - 1), Ok(3));
        assert_eq!(shapes.blocks_that_fit(work, least - 1), Err(least));
    }

    #[test]
    fn saved_inputs_take_what_they_are_kept_in() {
        let saved = |inputs, memory| {
            let shapes = Shapes { weights: WeightBytes { memory, ..shapes().weights }, ..shapes() };
            let work = Workload { tokens: 10, supervised: 5, pairs: 100 };
            shapes.saving(inputs).footprint(work, 1).saved_inputs
        };
        assert_eq!(saved(SavedInputs::F32, Memory::Host), 3 * 10 * 64 * 4);
        assert_eq!(saved(SavedInputs::Bf16, Memory::Card), 3 * 10 * 64 * 2);
        assert_eq!(saved(SavedInputs::Host, Memory::Card), 0);
        assert_eq!(saved(SavedInputs::Host, Memory::Host), 3 * 10 * 64 * 4);
    }

    #[test]
    fn norms_of_outputs_and_of_heads_keep_their_inputs() {
        let config = |family: &str| {
            let config = format!(
                r#"{{"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4,
                 "num_attention_heads": 4, "head_dim": 16, "model_type": "{family}"}}"#
            );
            DecoderConfig::from_json(config.as_bytes()).unwrap()
        };
        let (plain, work) = (shapes(), Workload { tokens: 100, supervised: 50, pairs: 1000 });
        let more = |family: &str| {
            let shapes = Shapes { model: config(family), ..plain.clone() };
            (shapes.footprint(work, 4).kept_graphs - plain.footprint(work, 4).kept_graphs) / (4 * 100 * FLOAT)
        };
        assert_eq!((more("mistral"), more("qwen2"), more("phi3")), (0, 0, 0));
        assert_eq!((more("qwen3"), more("gemma2"), more("gemma3_text")), (2 * 64, 2 * 64, 4 * 64));
    }

    #[test]
    fn more_adapted_layers_keep_more() {
        let mut all = shapes();
        let work = Workload { tokens: 100, supervised: 50, pairs: 10_000 };
        let few = all.footprint(work, 4).kept_graphs;
        all.adapted.extend(["gate_proj", "down_proj"].map(str::to_owned));
        assert_eq!(all.footprint(work, 4).kept_graphs - few, 4 * 100 * (64 + 256) * FLOAT);
    }

    #[test]
    fn gates_are_kept_as_products_are_rounded() {
        let work = Workload { tokens: 100, supervised: 50, pairs: 10_000 };
        let graphs = |precision| {
            let shapes = Shapes::new(&shapes().model, weights(precision), &LoraConfig::default()).unwrap();
            shapes.footprint(work, 4).kept_graphs
        };
        let saved = if Precision::fastest() == Precision::Bf16 { 4 * 100 * 256 * FLOAT } else { 0 };
        assert_eq!(graphs(Precision::F32) - graphs(Precision::Bf16), saved);
    }

    /// Many tokens take longer than a small save, few do not.
    #[test]
    fn a_save_counts_where_it_outlasts_a_step() {
        let save = |tokens| {
            let work = Workload { tokens, supervised: tokens, pairs: 0 };
            shapes().footprint(work, 4).save
        };
        let numbers = shapes().adapter_numbers;
        assert_eq!(save(100), numbers * (2 * FLOAT + OptimizerKind::default().state_bytes()));
        assert_eq!(save(100_000), 0);
    }

    /// Scores of 4 heads, while a block's backward pass runs; one dense matrix, all the time.
    #[test]
    fn a_card_has_scores_at_a_time_and_makes_one_matrix_dense() {
        let host = shapes();
        let work = Workload { tokens: 100, supervised: 50, pairs: 10_000 };
        let mut card = host.clone();
        card.weights = WeightBytes { memory: Memory::Card, dense: 1 << 16, ..host.weights };
        let (host, card) = (host.footprint(work, 4), card.footprint(work, 4));
        assert!(host.save > 0 && card.save == 0);
        assert_eq!(card.kept_graphs, host.kept_graphs);
        let beside = attention_bytes_on_card(4, 10_000) as u64;
        assert_eq!(card.block_graph - host.block_graph, beside);
        assert_eq!(card.peak() - host.peak() + host.save, beside + (1 << 16) + CONTEXT - PROGRAM);
    }
}
