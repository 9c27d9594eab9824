use std::path::{Path, PathBuf};
use std::process::ExitCode;

use miette::{IntoDiagnostic, Result, WrapErr, miette};
use pronk_data::{PreparedDataset, PromptTemplate, TextTokenizer, key};
use pronk_lora::Adapter;
use pronk_model::{Decoder, WeightBytes};
use pronk_train::{Ending, ModelCard, RunFolder, SamplePrompt, Samples, Summary, Trainer};

use super::prep;
use crate::args::Train;
use crate::base::{self, OpenedBase};
use crate::progress::TrainingProgress;
use crate::recipe::Recipe;
use crate::terminal::{print, stop_on_signal};

const SAMPLE_TOKENS: usize = 96;
/// The run's prepared rows, in its folder.
const PREPARED: &str = "prepared.safetensors";

/// `pronk train`
pub fn run(args: &Train) -> Result<ExitCode> {
    let recipe_path = match (&args.recipe, &args.resume) {
        (Some(recipe), _) => recipe.clone(),
        (None, Some(run)) => RunFolder::open(run).into_diagnostic()?.recipe(),
        (None, None) => return Err(miette!("expected a recipe, or --resume with a run's folder")),
    };
    let recipe = Recipe::read(&recipe_path, &args.set)?;
    let opened = base::open(&recipe.base.path, Path::new("."))?;
    let resumes = args.resume.is_some();
    let (folder, unused) = match &args.resume {
        Some(run) => (RunFolder::open(run).into_diagnostic()?, None),
        None => new_folder(&recipe, &recipe_path).map(|(folder, unused)| (folder, Some(unused)))?,
    };
    let data = prepared(&recipe, &opened, &folder, resumes)?;
    opened.must_embed(data.train.max_token_id().max(data.validation.max_token_id()))?;
    let stop = stop_on_signal("finishing this step, then saving")?;
    let opened = match recipe.base.quantize.scheme() {
        None => opened,
        Some(scheme) => match opened.quantized(scheme, &stop)? {
            Some(opened) => opened,
            None => return Ok(stopped_early()),
        },
    };
    let decoder = opened.load(&args.device.device, recipe.base.load_config())?;
    let adapter = initial_adapter(&recipe, &opened, &decoder)?;
    let card = ModelCard {
        base: opened.name.clone(),
        data: recipe.data.files.iter().filter_map(|f| Some(f.file_name()?.to_str()?.to_owned())).collect(),
        template: recipe.data.template.clone(),
        data_key: data.key.clone(),
    };
    let samples = Samples::new(sample_prompts(&recipe, &data, &opened.tokenizer)?, SAMPLE_TOKENS);
    let mut trainer = Trainer::new(
        &decoder,
        WeightBytes::of(&opened.base, recipe.base.load_config(), None).into_diagnostic()?,
        &opened.tokenizer,
        &data,
        recipe.data.order,
        recipe.train.clone(),
        adapter,
        folder.clone(),
        card,
        samples,
    )
    .into_diagnostic()?;
    let mut progress = TrainingProgress::new(0, trainer.total_steps());
    if resumes {
        trainer = trainer.resume(&mut progress).into_diagnostic()?;
        progress = TrainingProgress::new(trainer.step_number(), trainer.total_steps());
    }
    let mut unused = unused.map(Unused::keep);
    let ending = trainer.run(&mut progress, &stop).into_diagnostic();
    progress.finish();
    if let (Err(_), Some(unused), 0) = (&ending, &mut unused, trainer.step_number()) {
        unused.armed = true;
    }
    Ok(report(&ending?, &folder))
}

/// A new run's folder with the resolved recipe in it.
fn new_folder(recipe: &Recipe, recipe_path: &Path) -> Result<(RunFolder, Unused)> {
    let text = recipe.to_toml()?;
    let dir = &recipe.run.dir;
    let own = std::fs::canonicalize(dir.join("recipe.toml")).ok();
    if own.is_some() && own == std::fs::canonicalize(recipe_path).ok() {
        return Err(miette!(
            "run.dir: {} holds {} itself, which the resolved recipe would replace; expected another folder",
            dir.display(),
            recipe_path.display()
        ));
    }
    let unused = Unused::before(dir);
    let folder = RunFolder::create(dir).into_diagnostic()?;
    RunFolder::write(&folder.recipe(), text.as_bytes()).into_diagnostic()?;
    Ok((folder, unused))
}

/// What a new run has made so far; removed again unless it gets past its first step, so that a
/// mistake in the data or a device that is not there leaves nothing behind.
struct Unused {
    /// Whether to remove it. Not while training: a bug of ours must not take the results along.
    armed: bool,
    files: Vec<PathBuf>,
    /// Only where there were none: those of another run are not ours to remove.
    checkpoints: Option<PathBuf>,
    folders: Vec<PathBuf>,
}

impl Unused {
    /// Looks at the run's folder before anything is made.
    fn before(dir: &Path) -> Self {
        let absent = |path: &PathBuf| !path.exists();
        let names = ["recipe.toml", PREPARED, "samples.md", "metrics.jsonl"];
        let files = names.map(|name| dir.join(name));
        Self {
            armed: true,
            files: files.into_iter().filter(absent).collect(),
            checkpoints: Some(dir.join("checkpoints")).filter(absent),
            folders: dir.ancestors().map(Path::to_owned).take_while(absent).collect(),
        }
    }

    fn keep(mut self) -> Self {
        self.armed = false;
        self
    }
}

impl Drop for Unused {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        if let Some(checkpoints) = &self.checkpoints {
            let _ = std::fs::remove_dir_all(checkpoints); // the one before the first step, if it came so far
        }
        for file in &self.files {
            let _ = std::fs::remove_file(file); // it may not have been made
        }
        for folder in &self.folders {
            // Somebody else may have put something there by now; then it stays.
            let _ = std::fs::remove_dir(folder);
        }
    }
}

/// The run's prepared rows: read where they are there and fresh, else made. A run that goes on
/// must find those that it began with.
fn prepared(
    recipe: &Recipe,
    opened: &OpenedBase,
    folder: &RunFolder,
    resumes: bool,
) -> Result<PreparedDataset> {
    let config = recipe.prepare_config();
    let path = folder.root().join(PREPARED);
    let template = PromptTemplate::load(&config.template).into_diagnostic()?;
    let wanted = key(&config, &template, &opened.tokenizer).into_diagnostic()?;
    if let Ok(found) = PreparedDataset::read(&path) {
        if found.key == wanted {
            return Ok(found);
        }
        if resumes {
            return Err(miette!(
                "{}: the data, the template, the tokenizer or their limits have changed since this run began; \
                 put them back, or start a new run in another run.dir",
                folder.root().display()
            ));
        }
    }
    let data = prep::with_bar(&config, opened)?;
    data.write(&path).into_diagnostic()?;
    print(&prep::summary(&data.report));
    Ok(data)
}

fn initial_adapter(recipe: &Recipe, opened: &OpenedBase, decoder: &Decoder) -> Result<Adapter> {
    let modules = opened.base.config.linear_modules();
    let Some(dir) = &recipe.lora.init_adapter else {
        return Adapter::init(&recipe.lora.config, &modules, recipe.train.seed, decoder.device())
            .into_diagnostic();
    };
    let mut adapter = opened.load_adapter(dir, decoder).wrap_err("lora.init_adapter")?;
    let (found, wanted) = (&adapter.config, &recipe.lora.config);
    if found.rank != wanted.rank || (found.scale() - wanted.scale()).abs() > 1e-9 * wanted.scale() {
        return Err(miette!(
            "lora.init_adapter: {} has rank {} and scale {}, the recipe asks for rank {} and scale {}",
            dir.display(),
            found.rank,
            found.scale(),
            wanted.rank,
            wanted.scale()
        ));
    }
    // What is adapted is the adapter's; how it is trained on is the recipe's.
    adapter.config.dropout = wanted.dropout;
    Ok(adapter)
}

/// Prompts of held-out rows; where none can be told from its row, a few fixed ones.
fn sample_prompts(
    recipe: &Recipe,
    data: &PreparedDataset,
    tokenizer: &TextTokenizer,
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
    let template = PromptTemplate::load(&recipe.data.template).into_diagnostic()?;
    let instructions = [
        "Name three things that make a good morning.",
        "Explain why the sky is blue.",
        "Write a short note that thanks a neighbour for help.",
    ];
    let prompt = |instruction: &str| {
        let text = template.render_prompt(instruction, "")?;
        Ok(SamplePrompt { token_ids: tokenizer.encode_prompt(&text)?, text })
    };
    let prompts = instructions
        .into_iter()
        .take(recipe.run.samples)
        .map(prompt)
        .collect::<Result<_, pronk_data::DataError>>();
    prompts.into_diagnostic()
}

/// Ctrl-C before there was anything to save.
fn stopped_early() -> ExitCode {
    print("stopped before the first step; nothing is left behind\n");
    ExitCode::from(130)
}

fn report(ending: &Ending, folder: &RunFolder) -> ExitCode {
    let at = |path: PathBuf| path.display().to_string();
    match ending {
        Ending::Finished(Summary { steps, eval_before, best }) => {
            let mut text = format!("finished {steps} steps\n");
            if let (Some(before), Some((after, step))) = (eval_before, best) {
                text += &format!("eval loss {before:.4} before, {after:.4} after (lowest, at step {step})\n");
            }
            text += &format!("adapter   {}\nsamples   {}\n", at(folder.adapter()), at(folder.samples()));
            print(&text);
            ExitCode::SUCCESS
        }
        Ending::Interrupted { step, saved } => {
            let root = folder.root().display();
            print(&if *saved {
                format!("stopped after step {step}; go on with: pronk train --resume {root}\n")
            } else {
                format!("stopped after step {step}; nothing was saved, as train.save_steps is 0\n")
            });
            ExitCode::from(130)
        }
    }
}
