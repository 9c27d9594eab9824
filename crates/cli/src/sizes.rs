//! The two sizes that a recipe may leave out: how long rows are at most, and how many of them go
//! through the base together.

use miette::{IntoDiagnostic, Result};
use pronk_data::{MicroBatches, PrepareConfig, PreparedDataset, PromptTemplate, key};
use pronk_model::{DecoderConfig, LoadConfig, Memory, Residency, WeightBytes};
use pronk_train::{MemoryPlan, Plan, Shapes};

use crate::base::OpenedBase;
use crate::recipe::{Quantize, Recipe};

/// Rows that go through the base together where nobody knows how much memory there is.
const UNTOLD: usize = 4;

/// A recipe's rows, and how they go through the base.
pub struct Settled {
    pub data: PreparedDataset,
    pub micro_batches: MicroBatches,
    /// What was found for the sizes that were left out, a line each.
    pub found: String,
}

/// Has the rows prepared, finds the sizes that `recipe` leaves out, and writes them into it.
pub fn settle(
    recipe: &mut Recipe,
    opened: &OpenedBase,
    template: &PromptTemplate,
    memory: &MemoryPlan,
    prepare: impl FnOnce(&PrepareConfig) -> Result<PreparedDataset>,
) -> Result<Settled> {
    recipe.fetch_data()?;
    let mut found = String::new();
    let positions = opened.base.config.max_position_embeddings;
    // Where not even the shortest row fits, what would do is told once the rows are known.
    let limit = recipe.data.max_seq_len.or_else(|| memory.longest_row(positions)).unwrap_or(positions);
    let mut data = prepare(&recipe.prepare_config(limit))?;
    if recipe.data.max_seq_len.is_none() {
        let longest = data.report.longest.max(2);
        let why = match longest {
            _ if longest < limit => "the longest record",
            _ if limit < positions => "what the memory holds of one record",
            _ => "all positions that the base has",
        };
        found += &format!("data.max_seq_len = {longest}: {why}\n");
        if longest < limit {
            // Rows that a longer limit has left whole are those of this one too.
            let config = recipe.prepare_config(longest);
            data.key = key(&config, template, &opened.tokenizer).into_diagnostic()?;
            data.max_seq_len = longest;
        }
    }
    let max_seq_len = data.max_seq_len;
    recipe.data.max_seq_len = Some(max_seq_len);
    let of_size = |size| recipe.micro_batches(size, max_seq_len);
    let size = recipe.train.micro_batch_size.unwrap_or_else(|| {
        let plan = Plan::new(&recipe.train, recipe.data.order, data.mixture.clone());
        let most = recipe.train.batch_size;
        let fitting = memory.largest_micro_batch(&plan, &data.train, most, of_size);
        let (size, why) = match (fitting, memory.budget()) {
            (Some(size), _) if size == most => (size, "the whole batch"),
            (Some(size), _) => (size, "what the memory holds"),
            (None, Some(_)) => (1, "the least"),
            (None, None) => {
                (UNTOLD.min(most), "set train.memory_budget to have it follow the device's memory")
            }
        };
        found += &format!("train.micro_batch_size = {size}: {why}\n");
        size
    });
    let micro_batches = of_size(size);
    recipe.train.micro_batch_size = Some(size);
    Ok(Settled { data, micro_batches, found })
}

/// What the memory of a recipe's run depends on, with its base quantized and held as given.
pub fn shapes(
    recipe: &Recipe,
    opened: &OpenedBase,
    (quantize, weights): (Quantize, Residency),
    memory: Memory,
) -> Result<Shapes> {
    let quantization = recipe.base.quantization(quantize);
    let config = LoadConfig { weights, ..recipe.base.load_config() };
    let bytes = WeightBytes::of(&opened.base, config, quantization.as_ref(), memory).into_diagnostic()?;
    let model = DecoderConfig { vocab_size: opened.vocab_size, ..opened.base.config.clone() };
    Shapes::new(&model, bytes, &recipe.lora.config).into_diagnostic()
}

/// The recipe's run, held against the memory it will compute in.
pub fn memory(recipe: &Recipe, opened: &OpenedBase, memory: Memory) -> Result<MemoryPlan> {
    let shapes = shapes(recipe, opened, (recipe.base.quantize, recipe.base.weights), memory)?;
    Ok(MemoryPlan::new(&recipe.train, shapes))
}
