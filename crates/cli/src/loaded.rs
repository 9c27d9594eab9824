//! A recipe's run with all it needs in place, ready to train.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use miette::{IntoDiagnostic, Result, WrapErr, miette};
use pronk_data::{
    Conversation, MicroBatches, PrepareConfig, PreparedDataset, PromptTemplate, Rows, TextTokenizer, key,
    tokenize_prompt,
};
use pronk_kernels::open_device;
use pronk_lora::{Adapter, TensorName};
use pronk_model::{Base, CALIBRATION, Decoder, Memory, StartWeights, WeightBytes};
use pronk_train::{Checkpoint, ModelCard, RunFolder, SamplePrompt, Samples, TrainError, Trainer};

use crate::base::{OpenedBase, without_revision};
use crate::commands::prep;
use crate::model_card::Making;
use crate::progress;
use crate::recipe::{Quantize, Recipe};
use crate::run_lock::{LockedFile, RunLock};
use crate::sizes::{self, Settled, settle};
use crate::terminal::{print, stop_on_signal, warn};

const SAMPLE_TOKENS: usize = 96;
/// The run's prepared rows, in its folder.
const PREPARED: &str = "prepared.safetensors";

/// How a run comes to its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// It has none yet.
    Anew,
    /// It must find those that it began with.
    GoesOn,
    /// It goes on with those that its recipe makes now.
    GoesOnChanged,
}

/// What a trainer borrows.
pub struct LoadedRun {
    /// With all sizes filled in.
    pub recipe: Recipe,
    pub opened: OpenedBase,
    /// What it is made of; the base as it was before it was quantized.
    pub lock: RunLock,
    pub template: PromptTemplate,
    pub data: PreparedDataset,
    /// Whether the rows lie in no file yet.
    is_new: bool,
    pub micro_batches: MicroBatches,
    pub decoder: Decoder,
    /// Set when the user wants the run to end.
    pub stop: Arc<AtomicBool>,
}

impl LoadedRun {
    /// Prepares the rows, or finds them in `folder`, and fills in the sizes that the recipe left out; then loads the base.
    /// Nothing where the user stopped it meanwhile.
    pub fn load(
        mut recipe: Recipe,
        opened: OpenedBase,
        device: &str,
        folder: &RunFolder,
    ) -> Result<Option<Self>> {
        let computes_in = Memory::of(&open_device(device).into_diagnostic()?);
        let memory = sizes::memory(&recipe, &opened, computes_in)?;
        let template = PromptTemplate::load(&recipe.data.template, &opened.tokenizer).into_diagnostic()?;
        let mut is_new = false;
        let Settled { data, micro_batches, found } =
            settle(&mut recipe, &opened, &template, &memory, |config| {
                let (data, made) = prepared(config, &opened, &template, folder)?;
                is_new = made;
                Ok(data)
            })?;
        if is_new {
            print(&prep::summary(&data.report));
        }
        print(&found);
        opened.must_embed(data.train.max_token_id().max(data.validation.max_token_id()))?;
        let stop = stop_on_signal("finishing this step, then saving")?;
        let lock = RunLock::new(&recipe, LockedFile::of_base(&opened.base)?)?;
        let opened = match recipe.base.quantization(recipe.base.quantize) {
            None => opened,
            Some(quantization) => match opened.quantized(&quantization, &stop)? {
                Some(opened) => opened,
                None => return Ok(None),
            },
        };
        let decoder = opened.load(device, recipe.base.load_config())?;
        Ok(Some(Self { recipe, opened, lock, template, data, is_new, micro_batches, decoder, stop }))
    }

    /// Writes rows and recipe into `folder`, once nothing has refused them: until then they are what they were.
    pub fn write_down(&self, folder: &RunFolder) -> Result<()> {
        if self.is_new {
            let write = |path: &Path| Ok::<_, TrainError>(self.data.write(path)?);
            folder.replace_by(PREPARED, write).into_diagnostic()?;
        }
        write_recipe(&self.recipe, folder)
    }

    /// The newest whole checkpoint in `folder`, to be trained on by the recipe.
    fn newest_checkpoint(&self, folder: &RunFolder) -> Result<Option<Checkpoint>> {
        let Self { recipe, decoder, .. } = self;
        let (modules, device) = (decoder.config.adapter_modules(), decoder.device());
        let newest =
            Checkpoint::load_newest(folder, &modules, &recipe.train, device, warn).into_diagnostic()?;
        let Some(mut checkpoint) = newest else { return Ok(None) };
        let found = self.opened.base.as_loftq_config();
        if let Some(of) = &checkpoint.adapter.config.loftq_config
            && (of.loftq_bits, &of.skip_modules) != (found.loftq_bits, &found.skip_modules)
        {
            return Err(miette!(
                "{}: this run's adapter makes up for what its base lost when it was quantized to {} bits; expected \
                 base.quantize and base.skip_modules as they were, or a new run",
                folder.root().display(),
                of.loftq_bits
            ));
        }
        // What is adapted is the checkpoint's; how it is trained on is the recipe's.
        checkpoint.adapter.config.dropout = recipe.lora.config.dropout;
        Ok(Some(checkpoint))
    }

    /// What training starts from: an adapter that there is, or a fresh one.
    fn initial_adapter(&self) -> Result<Adapter> {
        let Self { recipe, opened, lock, decoder, .. } = self;
        if let Some(dir) = &recipe.lora.init_adapter {
            return adapter_to_start_from(dir, recipe, opened, decoder);
        }
        let original = match recipe.base.quantize {
            Quantize::None => None,
            // What is quantized already has nothing more to lose.
            _ => Some(Base::open(&lock.base.path).into_diagnostic()?)
                .filter(|base| base.quantization().is_none()),
        };
        let records = calibration_records(&self.data.train);
        let weights = StartWeights { base: &opened.base, original: original.as_ref(), records: &records };
        let bar = progress::bar("decomposing weights", 0);
        let progress = |done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        };
        let adapter = decoder.started_adapter(&recipe.lora.config, weights, recipe.train.seed, progress);
        bar.finish_and_clear();
        let mut adapter = adapter.into_diagnostic()?;
        opened.base.set_whole(&mut adapter, opened.vocab_size, decoder.device()).into_diagnostic()?;
        Ok(adapter)
    }

    /// The run as it starts: before its first step, or where its newest checkpoint left it.
    pub fn trainer(&self, folder: RunFolder, start: Start) -> Result<Trainer<'_>> {
        let Self { recipe, opened, lock, template, data, micro_batches, decoder, .. } = self;
        let newest = if start == Start::Anew { None } else { self.newest_checkpoint(&folder)? };
        let adapter = match &newest {
            Some(checkpoint) => checkpoint.adapter.clone(),
            None => self.initial_adapter()?,
        };
        let card = ModelCard {
            base: without_revision(&opened.name).to_owned(),
            opening: Making::new(opened, &adapter, Some(template))?.of_adapter(),
            data: lock.data.iter().map(LockedFile::named).collect(),
            template,
            data_key: data.key.clone(),
            recipe: recipe.to_public_toml()?,
        };
        let computes_in = Memory::of(decoder.device());
        let weights = WeightBytes::of(&opened.base, recipe.base.load_config(), None, computes_in);
        let trainer = Trainer::new(
            decoder,
            weights.into_diagnostic()?,
            &opened.tokenizer,
            data,
            recipe.data.order,
            *micro_batches,
            recipe.train.clone(),
            adapter,
            folder,
            card,
            Samples::new(sample_prompts(recipe, data, &opened.tokenizer, template)?, SAMPLE_TOKENS),
        )
        .into_diagnostic()?;
        match start {
            Start::Anew => Ok(trainer),
            _ => trainer.resume(newest, start == Start::GoesOnChanged, warn).into_diagnostic(),
        }
    }
}

/// Writes the resolved recipe into the run's folder, unless it stands there already.
pub fn write_recipe(recipe: &Recipe, folder: &RunFolder) -> Result<()> {
    let text = recipe.to_toml()?;
    if std::fs::read(folder.recipe()).is_ok_and(|found| found == text.as_bytes()) {
        return Ok(());
    }
    folder.replace("recipe.toml", text.as_bytes()).into_diagnostic()
}

/// The run's prepared rows: read where they are there and fresh, else made. Whether they were made comes with them; a run
/// that goes on refuses others than it began with.
fn prepared(
    config: &PrepareConfig,
    opened: &OpenedBase,
    template: &PromptTemplate,
    folder: &RunFolder,
) -> Result<(PreparedDataset, bool)> {
    let path = folder.root().join(PREPARED);
    let wanted = key(config, template, &opened.tokenizer).into_diagnostic()?;
    if let Some(found) = PreparedDataset::read(&path).ok().filter(|found| found.key == wanted) {
        return Ok((found, false));
    }
    let rows = prep::with_bar(config, opened, folder.root())?;
    Ok((rows.load().into_diagnostic()?, true))
}

/// The adapter in `dir` as `lora.init_adapter`.
fn adapter_to_start_from(
    dir: &Path,
    recipe: &Recipe,
    opened: &OpenedBase,
    decoder: &Decoder,
) -> Result<Adapter> {
    let mut adapter = opened.load_adapter(dir, decoder).wrap_err("lora.init_adapter")?;
    let wanted = &recipe.lora.config;
    if wanted.use_dora != adapter.config.use_dora {
        let (found, asked) = (adapter.config.use_dora, wanted.use_dora);
        return Err(miette!(
            "lora.init_adapter: {} has use_dora = {found}, the recipe asks for use_dora = {asked}",
            dir.display()
        ));
    }
    if adapter.config.loftq_config.is_some() && opened.base.quantization().is_none() {
        return Err(miette!(
            "lora.init_adapter: {} belongs to this base quantized, the recipe has base.quantize = \"none\"",
            dir.display()
        ));
    }
    for (name, pair) in &adapter.pairs {
        let (rank, scale) = (wanted.rank_of(name), wanted.scale_of(name));
        if pair.rank() != rank || (pair.scale - scale).abs() > 1e-9 * scale {
            return Err(miette!(
                "lora.init_adapter: {} has rank {} and scale {} at {name}, the recipe asks for rank {rank} and scale \
                 {scale}",
                dir.display(),
                pair.rank(),
                pair.scale,
            ));
        }
    }
    let whole = wanted.whole(&opened.base.config.adapter_modules()).into_diagnostic()?;
    if !whole.keys().eq(adapter.whole.keys()) {
        let shown = |names: Vec<&TensorName>| match &names[..] {
            [] => "nothing".to_owned(),
            names => names.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
        };
        return Err(miette!(
            "lora.init_adapter: {} trains {} whole, the recipe {}; expected the same lora.modules_to_save, \
             lora.ensure_weight_tying and lora.bias",
            dir.display(),
            shown(adapter.whole.keys().collect()),
            shown(whole.keys().collect()),
        ));
    }
    adapter.grow_vocabulary(opened.vocab_size);
    // What is adapted is the adapter's; how it is trained on is the recipe's.
    adapter.config.dropout = wanted.dropout;
    Ok(adapter)
}

/// Beginnings of records from all over the rows.
fn calibration_records(rows: &Rows) -> Vec<Vec<u32>> {
    let [records, tokens] = CALIBRATION;
    let chosen = rows.iter().step_by(rows.len().div_ceil(records).max(1));
    chosen.map(|row| row.token_ids.iter().take(tokens).copied().collect()).collect()
}

/// Prompts of held-out rows; where none can be told from its row, a few fixed ones.
fn sample_prompts(
    recipe: &Recipe,
    data: &PreparedDataset,
    tokenizer: &TextTokenizer,
    template: &PromptTemplate,
) -> Result<Vec<SamplePrompt>> {
    if !recipe.data.train_on_inputs && !data.validation.is_empty() {
        let prompt_of = |row: pronk_data::ExampleView| {
            let prompt = row.loss_mask.iter().take_while(|learned| !**learned).count();
            let token_ids = row.token_ids.get(..prompt).unwrap_or_default().to_vec();
            Ok(SamplePrompt { text: tokenizer.decode(&token_ids)?, token_ids })
        };
        return data
            .validation
            .iter()
            .take(recipe.run.samples)
            .map(prompt_of)
            .collect::<Result<_, _>>()
            .map_err(|e: pronk_data::DataError| miette!("{e}"));
    }
    let instructions = [
        "Name three things that make a good morning.",
        "Explain why the sky is blue.",
        "Write a short note that thanks a neighbour for help.",
    ];
    let prompt = |instruction: &str| {
        let token_ids = tokenize_prompt(tokenizer, &Conversation::question(instruction, ""), template)?;
        Ok(SamplePrompt { text: tokenizer.decode(&token_ids)?, token_ids })
    };
    let prompts = instructions
        .into_iter()
        .take(recipe.run.samples)
        .map(prompt)
        .collect::<Result<_, pronk_data::DataError>>();
    prompts.into_diagnostic()
}
