//! Recipes: TOML files that say what to train, on what, and how.

use std::fs;
use std::path::{Path, PathBuf};

use miette::{IntoDiagnostic, Result, WrapErr, miette};
use pronk_data::{Columns, DataFile, Learn, MicroBatches, Order, PrepareConfig, RecordFormat, RowConfig};
use pronk_kernels::Precision;
use pronk_lora::{InitLoraWeights, LoraConfig};
use pronk_model::{LoadConfig, Quantization, Residency, Scheme};
use pronk_train::TrainConfig;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::datasets;
use crate::knobs::{apply, section, toml_error, unknown_knobs};

/// A whole recipe. Relative paths are relative to the recipe's folder.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recipe {
    pub base: BaseTable,
    pub data: DataTable,
    pub tokens: TokensTable,
    pub lora: LoraTable,
    pub train: TrainConfig,
    pub run: RunTable,
}

/// `[base]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BaseTable {
    /// A Hugging Face directory, a GGUF file, or a hub id.
    pub path: String,
    /// What the linear layers of the blocks are quantized to before training; kept in a cache.
    pub quantize: Quantize,
    /// Linear layers that stay in 16 bits where the others are quantized.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub skip_modules: Vec<String>,
    /// What the factors of products with the base are rounded to.
    pub compute: Compute,
    /// "streamed" reads the blocks from the disk while it computes: a base of any size fits.
    pub weights: Residency,
}

impl Default for BaseTable {
    fn default() -> Self {
        Self {
            path: String::new(),
            quantize: Quantize::None,
            skip_modules: Vec::new(),
            compute: Compute::Auto,
            weights: Residency::Resident,
        }
    }
}

impl BaseTable {
    /// How its linear layers are quantized with `quantize`, if they are.
    pub fn quantization(&self, quantize: Quantize) -> Option<Quantization> {
        let scheme = quantize.scheme()?;
        Some(Quantization { scheme, skip_modules: self.skip_modules.clone() })
    }

    /// What the model crate needs of it.
    pub fn load_config(&self) -> LoadConfig {
        let precision = match self.compute {
            // Where nothing multiplies bf16 faster, it is float32 by itself.
            Compute::Auto | Compute::Bf16 => Precision::Bf16,
            Compute::F32 => Precision::F32,
        };
        LoadConfig { precision, weights: self.weights }
    }
}

/// `base.quantize`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantize {
    None,
    Nf4,
    Int8,
}

impl Quantize {
    /// What the model crate needs of it.
    fn scheme(self) -> Option<Scheme> {
        match self {
            Self::None => None,
            Self::Nf4 => Some(Scheme::Nf4),
            Self::Int8 => Some(Scheme::Int8),
        }
    }
}

/// `base.compute`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// bf16 where the device has an instruction for it, otherwise float32.
    Auto,
    F32,
    Bf16,
}

/// `[data]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataTable {
    /// Data files, or data sets of the hub; each a path, or a path with a weight.
    pub files: Vec<FileEntry>,
    /// What a record is.
    pub format: RecordFormat,
    /// alpaca, alpaca-short, vicuna; chat, the base's own; or a minijinja file.
    pub template: String,
    /// Which of a conversation's answers are learned.
    pub learn: Learn,
    /// Tokens of a row at most; what is beyond is cut away and counted. Left out: the longest record's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_seq_len: Option<usize>,
    /// Learn the prompts too.
    pub train_on_inputs: bool,
    /// Rows to hold out for evaluation. 0: none.
    pub val_size: usize,
    /// "shuffle" anew each epoch, or "sequential".
    pub order: Order,
    /// Fill micro-batches with as many records as their tokens hold, instead of a fixed number.
    pub packing: bool,
    /// Go on without the records that cannot be read.
    pub skip_bad: bool,
    /// What the fields of records are called.
    pub columns: Columns,
}

/// An entry of `data.files`: `"a.json"`, or `{ path = "a.json", weight = 2.0 }`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected paths, or tables such as { path = \"a.json\", weight = 2.0 }")]
pub enum FileEntry {
    /// Each row once an epoch.
    Plain(PathBuf),
    /// As often as its weight says.
    Weighted(DataFile),
}

impl FileEntry {
    fn path_mut(&mut self) -> &mut PathBuf {
        match self {
            Self::Plain(path) | Self::Weighted(DataFile { path, .. }) => path,
        }
    }
}

impl From<FileEntry> for DataFile {
    fn from(entry: FileEntry) -> Self {
        match entry {
            FileEntry::Plain(path) => path.into(),
            FileEntry::Weighted(file) => file,
        }
    }
}

impl Default for DataTable {
    fn default() -> Self {
        Self {
            files: Vec::new(),
            format: RecordFormat::Auto,
            template: "alpaca".into(),
            learn: Learn::All,
            max_seq_len: None,
            train_on_inputs: false,
            val_size: 0,
            order: Order::Shuffle,
            packing: true,
            skip_bad: false,
            columns: Columns::default(),
        }
    }
}

/// `[tokens]`
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TokensTable {
    /// Tokens to add to the base's.
    pub add: Vec<String>,
}

/// `[lora]`
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LoraTable {
    #[serde(flatten)]
    pub config: LoraConfig,
    /// Start from this adapter directory instead of a fresh one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_adapter: Option<PathBuf>,
}

/// `[run]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunTable {
    /// The run's folder.
    pub dir: PathBuf,
    /// Prompts to answer before, during and after. 0: none.
    pub samples: usize,
}

impl Default for RunTable {
    fn default() -> Self {
        Self { dir: PathBuf::new(), samples: 3 }
    }
}

impl Recipe {
    /// Reads the recipe at `path` with the changes `set` (`table.knob=value`) made to it, and its
    /// paths made absolute. All problems are told at once.
    pub fn read(path: &Path, set: &[String]) -> Result<Self> {
        let text = fs::read_to_string(path).into_diagnostic().wrap_err_with(|| path.display().to_string())?;
        let mut table: Table =
            toml::from_str(&text).map_err(|e| miette!("{}: {}", path.display(), toml_error(&e)))?;
        for change in set {
            apply(&mut table, change)?;
        }
        let mut problems = unknown_knobs(&table);
        let recipe = Self::from_table(table, &mut problems);
        match recipe {
            Some(recipe) if problems.is_empty() => recipe.with_absolute_paths(path),
            _ => Err(miette!("{}:\n  {}", path.display(), problems.join("\n  "))),
        }
    }

    fn from_table(mut table: Table, problems: &mut Vec<String>) -> Option<Self> {
        let init_adapter = match table.get_mut("lora").and_then(Value::as_table_mut) {
            Some(lora) => lora.remove("init_adapter"),
            None => None,
        };
        let init_adapter = match init_adapter {
            None => None,
            Some(Value::String(path)) => Some(PathBuf::from(path)),
            Some(other) => {
                problems.push(format!("lora.init_adapter: expected a path, found {other}"));
                None
            }
        };
        let base: Option<BaseTable> = section(&mut table, "base", problems);
        let data: Option<DataTable> = section(&mut table, "data", problems);
        let tokens: Option<TokensTable> = section(&mut table, "tokens", problems);
        let mut lora: Option<LoraConfig> = section(&mut table, "lora", problems);
        if let (Some(tokens), Some(lora)) = (&tokens, &mut lora) {
            save_vocabulary(tokens, lora);
        }
        let train: Option<TrainConfig> = section(&mut table, "train", problems);
        let run: Option<RunTable> = section(&mut table, "run", problems);
        problems.extend(train.iter().flat_map(TrainConfig::problems).map(|e| e.to_string()));
        problems.extend(lora.as_ref().and_then(|lora| lora.validate().err()).map(|e| e.to_string()));
        let recipe = Self {
            base: base?,
            data: data?,
            tokens: tokens?,
            lora: LoraTable { config: lora?, init_adapter },
            train: train?,
            run: run?,
        };
        if !recipe.base.skip_modules.is_empty() && recipe.base.quantize == Quantize::None {
            problems
                .push("base.skip_modules: expected base.quantize = \"nf4\" or \"int8\" beside it".to_owned());
        }
        problems.extend(recipe.start_problem());
        let missing = [
            (recipe.base.path.is_empty(), "base.path", "a Hugging Face directory, a .gguf file, or a hub id"),
            (recipe.data.files.is_empty(), "data.files", "a list of instruction files"),
            (recipe.run.dir.as_os_str().is_empty(), "run.dir", "the folder for the run"),
        ];
        for (_, knob, what) in missing.iter().filter(|m| m.0) {
            // One that is there, but of a wrong type, has been named already.
            if !problems.iter().any(|problem| problem.starts_with(&format!("{knob}:"))) {
                problems.push(format!("{knob}: missing; expected {what}"));
            }
        }
        if let Some(found @ ..2) = recipe.data.max_seq_len {
            problems.push(format!("data.max_seq_len: expected a whole number from 2, found {found}"));
        }
        Some(recipe)
    }

    /// What an adapter starts from, and what is restored beside it, against the base and the other start that there
    /// may be.
    fn start_problem(&self) -> Option<String> {
        let LoraTable { config, init_adapter } = &self.lora;
        let (init, rank) = (config.init_lora_weights, config.restore_rank);
        let (knob, default, found) = match rank {
            0 => ("init_lora_weights", "\"default\"", format!("\"{init}\"")),
            rank => ("restore_rank", "0", rank.to_string()),
        };
        let refuse = |expected: &str| Some(format!("lora.{knob}: expected {expected}, found {found}"));
        let asked = rank > 0 || init != InitLoraWeights::Default;
        if asked && init_adapter.is_some() {
            return refuse(&format!("{default} beside lora.init_adapter, which is the start"));
        }
        if config.restores() && self.base.quantize == Quantize::None {
            return refuse("base.quantize = \"nf4\" or \"int8\" beside it: it gives back what that loses");
        }
        let surplus = config.loftq_config.is_some() && !config.restores();
        surplus.then(|| {
            "lora.loftq_config: expected restore_rank, or init_lora_weights = \"loftq\" or \"qera\", beside it"
                .to_owned()
        })
    }

    fn with_absolute_paths(mut self, recipe: &Path) -> Result<Self> {
        let recipe = std::path::absolute(recipe).into_diagnostic()?;
        let folder = recipe.parent().unwrap_or(Path::new("/"));
        let absolute = |path: &mut PathBuf| *path = folder.join(&*path);
        for path in self.data.files.iter_mut().map(FileEntry::path_mut) {
            if folder.join(&*path).exists() || !datasets::is_name(path) {
                absolute(path);
            }
        }
        absolute(&mut self.run.dir);
        self.lora.init_adapter.iter_mut().for_each(absolute);
        for name in [&mut self.base.path, &mut self.data.template] {
            // A name that is no file here is a hub id, or a template of ours.
            let path = folder.join(&*name);
            if path.exists() {
                *name = path.display().to_string();
            }
        }
        Ok(self)
    }

    /// Puts the files of data sets of the hub in their place: the run is of those, whatever is published later.
    pub fn fetch_data(&mut self) -> Result<()> {
        let files: Vec<DataFile> = self.data.files.iter().cloned().map(DataFile::from).collect();
        let found = datasets::fetch(files.clone())?;
        if found != files {
            self.data.files = found.into_iter().map(FileEntry::Weighted).collect();
        }
        Ok(())
    }

    /// The recipe with every default filled in, as it is saved with its run.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).into_diagnostic()
    }

    /// The same for others to read: of paths on this machine only the last part, of the run's nothing.
    pub fn to_public_toml(&self) -> Result<String> {
        let mut public = self.clone();
        let shorten = |path: &mut PathBuf| {
            if let Some(name) = path.file_name().filter(|_| path.is_absolute()) {
                *path = name.into();
            }
        };
        public.data.files.iter_mut().map(FileEntry::path_mut).for_each(shorten);
        public.lora.init_adapter.iter_mut().for_each(shorten);
        public.run.dir = "run".into();
        for name in [&mut public.base.path, &mut public.data.template] {
            let mut path = PathBuf::from(&*name);
            shorten(&mut path);
            *name = path.display().to_string();
        }
        public.to_toml()
    }

    /// What the data crate needs of it, with rows of at most `max_seq_len` tokens.
    pub fn prepare_config(&self, max_seq_len: usize) -> PrepareConfig {
        let data = self.data.clone();
        PrepareConfig {
            files: data.files.into_iter().map(Into::into).collect(),
            format: data.format,
            columns: data.columns,
            template: data.template,
            row: RowConfig { max_seq_len, train_on_inputs: data.train_on_inputs, learn: data.learn },
            val_size: data.val_size,
            skip_bad: data.skip_bad,
        }
    }

    /// Micro-batches of `size` rows: where they are packed, of as many tokens as `size` of the
    /// longest rows have.
    pub fn micro_batches(&self, size: usize, max_seq_len: usize) -> MicroBatches {
        if self.data.packing {
            MicroBatches::Packed { tokens: size.saturating_mul(max_seq_len) }
        } else {
            MicroBatches::Grouped { rows: size }
        }
    }
}

/// Tokens that are added have to be learned: embeddings and head are trained whole with them.
fn save_vocabulary(tokens: &TokensTable, lora: &mut LoraConfig) {
    for module in ["embed_tokens", "lm_head"] {
        let is_named = |name: &String| name.rsplit('.').next() == Some(module);
        if !tokens.add.is_empty() && !lora.modules_to_save.iter().any(is_named) {
            lora.modules_to_save.push(module.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = "[base]\npath = 'b'\n[data]\nfiles = ['d.json']\n[run]\ndir = 'r'\n";

    fn read(text: &str, set: &[&str]) -> Result<Recipe> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("recipe.toml");
        fs::write(&path, text).unwrap();
        Recipe::read(&path, &set.iter().map(|&s| s.to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn changes_from_the_command_line_win() {
        let recipe =
            read(MINIMAL, &["train.max_steps=8", "lora.target_modules=all-linear", "run.dir=else/where"]);
        let recipe = recipe.unwrap();
        assert_eq!(recipe.train.max_steps, Some(8));
        assert!(recipe.run.dir.is_absolute() && recipe.run.dir.ends_with("else/where"));
        assert!(DataFile::from(recipe.data.files[0].clone()).path.is_absolute());
    }

    #[test]
    fn all_typos_are_named_with_what_was_meant() {
        let text = format!("{MINIMAL}[train]\nlearing_rate = 1\nbatch_size = 'x'\n[lorra]\nrank = 1\n");
        let error = format!("{:?}", read(&text, &["lora.rank=0"]).unwrap_err());
        for part in
            ["train.learing_rate: unknown knob; did you mean learning_rate?", "lorra", "train.batch_size"]
        {
            assert!(error.contains(part), "{part} not in {error}");
        }
    }

    #[test]
    fn the_resolved_recipe_reads_back_the_same() {
        let set = [
            "lora.init_adapter=a",
            "train.max_steps=3",
            "data.columns.instruction=question",
            "data.format=sharegpt",
            "data.files=['a.json', {path = 'b.json', weight = 0.5}]",
        ];
        let recipe = read(MINIMAL, &set).unwrap();
        assert_eq!(recipe.data.columns.instruction.as_deref(), Some("question"));
        let again = read(&recipe.to_toml().unwrap(), &[]).unwrap();
        assert_eq!(again, recipe);
    }

    #[test]
    fn tokens_that_are_added_are_trained() {
        let saved = |set: &[&str]| read(MINIMAL, set).unwrap().lora.config.modules_to_save;
        assert!(saved(&[]).is_empty());
        assert_eq!(saved(&["tokens.add=['<|hum|>']"]), ["embed_tokens", "lm_head"]);
        let named = "lora.modules_to_save=['model.embed_tokens']";
        assert_eq!(saved(&["tokens.add=['<|hum|>']", named]), ["model.embed_tokens", "lm_head"]);
    }

    #[test]
    fn what_is_missing_is_said() {
        let error = format!("{:?}", read("", &[]).unwrap_err());
        assert!(
            error.contains("base.path") && error.contains("data.files") && error.contains("run.dir"),
            "{error}"
        );
    }
}
