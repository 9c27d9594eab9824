//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use pronk_data::{Check, Learn, RecordFormat};
use pronk_export::{GgufType, Runtime};
use pronk_model::Scheme;

/// Cheap instruction tuning: a `LoRA` adapter and a merged model from an instruction JSON.
#[derive(Debug, Parser)]
#[command(name = "pronk", version, propagate_version = true)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Tokenizes instruction files into a prepared file
    Prep(Prep),
    /// Tunes an adapter by a recipe, or goes on with a run
    Train(Train),
    /// Says what a recipe will take, in memory, time and money, before any weight is read
    Plan(Plan),
    /// Measures what a step of a recipe takes on this machine, part by part
    Bench(Bench),
    /// Adds an adapter to its base, and proves the result
    Merge(Merge),
    /// Looks into adapters, and makes one of several
    Adapter(AdapterArgs),
    /// Writes an adapter for another runtime, and proves the result
    Export(Export),
    /// Answers an instruction, or a file of them
    Generate(Generate),
    /// Talks: question and answer in turn
    Chat(Chat),
    /// Shows what a prepared file holds, what became of a run, or what a model computes
    Inspect(Inspect),
    /// Takes every hash of a run, a checkpoint, an adapter, a merged model or an export again, and names what has
    /// changed
    Verify(Verify),
    /// Sends an adapter, a merged model or an export to a repository of the Hugging Face hub
    Push(Push),
    /// Writes a base of a published shape with random weights, to measure with
    Synth(Synth),
    /// Lists the devices this binary can use
    Devices,
}

#[derive(Debug, Args)]
pub struct Prep {
    /// Data files: JSON array, JSON Lines or CSV, as they are or packed by gzip or zstd; Parquet or Arrow; or a
    /// data set of the hub, `OWNER/NAME`, perhaps with `/FOLDER` and `@REVISION`
    #[arg(long, num_args = 1.., required = true)]
    pub data: Vec<PathBuf>,
    /// What a record is: auto looks at the first ones, and says what it found
    ///
    /// alpaca: instruction, input, output, perhaps system. sharegpt: conversations of from and value. messages:
    /// messages of role and content. prompt-completion and text: text as it is, without a template.
    #[arg(long, value_parser = record_format, default_value = "auto", value_name = "FORMAT")]
    pub format: RecordFormat,
    /// What a field is called here, such as `instruction=question`
    #[arg(long, value_name = "FIELD=NAME")]
    pub column: Vec<String>,
    /// The base whose tokenizer is used: a Hugging Face directory, a GGUF file, or a hub id
    #[arg(long)]
    pub base: String,
    /// The prepared file to write
    #[arg(long)]
    pub out: PathBuf,
    /// alpaca, alpaca-short, vicuna; chat, the base's own chat template; or a minijinja file
    #[arg(long, default_value = "alpaca")]
    pub template: String,
    /// Which of a conversation's answers are learned: all, or last
    #[arg(long, value_parser = learn, default_value = "all", value_name = "all|last")]
    pub learn: Learn,
    /// Tokens of a row at most; what is beyond is cut away and counted
    #[arg(long, default_value_t = 512)]
    pub max_seq_len: usize,
    /// Learn the prompts too
    #[arg(long)]
    pub train_on_inputs: bool,
    /// Rows to hold out for evaluation
    #[arg(long, default_value_t = 0)]
    pub val_size: usize,
    /// Go on without the records that cannot be read
    #[arg(long)]
    pub skip_bad: bool,
}

#[derive(Debug, Args)]
pub struct Train {
    /// The recipe, a TOML file
    #[arg(required_unless_present = "resume", conflicts_with = "resume")]
    pub recipe: Option<PathBuf>,
    /// Go on with the run in this folder, from its newest checkpoint
    #[arg(long, value_name = "RUN")]
    pub resume: Option<PathBuf>,
    /// Change a knob of the recipe, such as `train.max_steps=8`
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Go on although the data, the base or the recipe have changed since the run began, by --set too
    #[arg(long, requires = "resume")]
    pub accept_changes: bool,
    /// Write what happens when, as a trace that `chrome://tracing` and Perfetto open
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
    #[command(flatten)]
    pub device: DeviceArgument,
}

#[derive(Debug, Args)]
pub struct Bench {
    /// The recipe, a TOML file
    pub recipe: PathBuf,
    /// Change a knob of the recipe, such as `train.recompute=blocks`
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Optimizer steps that are measured
    #[arg(long, default_value_t = 8)]
    pub steps: u64,
    /// Optimizer steps before them that are not
    #[arg(long, default_value_t = 2)]
    pub warmup: u64,
    /// Print a JSON object instead of a table, as the last line
    #[arg(long)]
    pub json: bool,
    /// Write what happens when, as a trace that `chrome://tracing` and Perfetto open
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
    #[command(flatten)]
    pub device: DeviceArgument,
}

#[derive(Debug, Args)]
pub struct Plan {
    /// The recipe, a TOML file
    pub recipe: PathBuf,
    /// Change a knob of the recipe, such as `base.quantize=nf4`
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Hold it against this card's memory and speed instead of this machine's
    #[arg(long, value_name = "CARD")]
    pub gpu: Option<String>,
    /// What an hour of the machine costs, in dollars
    #[arg(long, value_name = "DOLLARS_PER_HOUR", allow_negative_numbers = true)]
    pub price: Option<f64>,
}

#[derive(Debug, Args)]
pub struct Merge {
    /// The base: a Hugging Face directory, a GGUF file, or a hub id
    #[arg(long)]
    pub base: String,
    /// The adapter's directory
    #[arg(long)]
    pub adapter: PathBuf,
    /// The directory to write; it must not exist, or be empty
    #[arg(long)]
    pub out: PathBuf,
    /// What to write: a Hugging Face directory, or a directory with a GGUF file for llama.cpp and Ollama
    #[arg(long, value_enum, default_value = "safetensors")]
    pub format: MergeFormat,
    /// Format of the weights; left out, each tensor keeps its own
    #[arg(long, value_enum, conflicts_with = "gguf_type")]
    pub dtype: Option<Dtype>,
    /// Type of a GGUF file: `f32`, `f16`, `bf16`, `q8_0`, `q4_0`, `q4_k`; left out, the base's own, or `f32` where that is
    /// quantized
    #[arg(long, value_name = "TYPE")]
    pub gguf_type: Option<GgufType>,
    /// Merge into this base, the 16-bit original of a quantized one that the adapter was trained on
    #[arg(long, value_name = "BASE")]
    pub onto: Option<String>,
    #[command(flatten)]
    pub device: DeviceArgument,
}

#[derive(Debug, Args)]
pub struct AdapterArgs {
    #[command(subcommand)]
    pub what: AdapterCommand,
}

#[derive(Debug, Subcommand)]
pub enum AdapterCommand {
    /// What an adapter sits on, how large its updates are, and what is wrong with it
    Info {
        /// The adapter's directory
        dir: PathBuf,
    },
    /// A weighted sum of adapters, as PEFT's `add_weighted_adapter` forms it
    Combine(Combine),
    /// An adapter out of a tuned model: the largest singular values of what sets it apart from its base
    Extract(Extract),
}

#[derive(Debug, Args)]
pub struct Combine {
    /// An adapter's directory; once for each
    #[arg(long, required = true, value_name = "DIR")]
    pub adapter: Vec<PathBuf>,
    /// Its weight; once for each, in the same order
    #[arg(long, required = true, allow_negative_numbers = true)]
    pub weight: Vec<f64>,
    /// The directory to write; it must not exist, or be empty
    #[arg(long)]
    pub out: PathBuf,
    /// cat: the exact sum, at the sum of the ranks. linear: sums of A and of B, at one rank
    #[arg(long, value_enum, default_value = "cat")]
    pub method: Method,
}

#[derive(Debug, Args)]
pub struct Extract {
    /// The base: a Hugging Face directory, a GGUF file, or a hub id
    #[arg(long)]
    pub base: String,
    /// The same model, tuned
    #[arg(long)]
    pub tuned: String,
    /// The directory to write; it must not exist, or be empty
    #[arg(long)]
    pub out: PathBuf,
    /// Rank of the adapter
    #[arg(long, default_value_t = 16)]
    pub rank: usize,
    /// Linear layers that may get an adapter; left out, all of the blocks
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub target_modules: Vec<String>,
    /// Seeds the directions in which singular values are looked for
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// How adapters become one.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum Method {
    Cat,
    Linear,
}

#[derive(Debug, Args)]
pub struct Export {
    /// The base: a Hugging Face directory, a GGUF file, or a hub id
    #[arg(long)]
    pub base: String,
    /// The adapter's directory
    #[arg(long)]
    pub adapter: PathBuf,
    /// Who is to load it: peft, gguf (llama.cpp), mlx, ollama, vllm, mistralrs
    #[arg(long, value_name = "RUNTIME")]
    pub to: Runtime,
    /// The directory to write; it must not exist, or be empty
    #[arg(long)]
    pub out: PathBuf,
    #[command(flatten)]
    pub device: DeviceArgument,
}

/// What a merged model is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum MergeFormat {
    Safetensors,
    Gguf,
}

/// Formats of merged weights.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum Dtype {
    F32,
    F16,
    Bf16,
}

/// Who answers, and how.
#[derive(Debug, Args)]
pub struct Speaking {
    /// The base: a Hugging Face directory, a GGUF file, or a hub id
    #[arg(long)]
    pub base: String,
    /// The adapter's directory; several, each with a name, to choose from
    #[arg(long, value_name = "[NAME=]DIR")]
    pub adapter: Vec<String>,
    /// alpaca, alpaca-short, vicuna; chat, the base's own chat template; or a minijinja file. Left out, the one that
    /// the adapter was trained with; without one, the base's own, else alpaca
    #[arg(long)]
    pub template: Option<String>,
    /// Tokens of an answer at most
    #[arg(long, default_value_t = 256, allow_negative_numbers = true)]
    pub max_new_tokens: usize,
    /// 0 always takes the likeliest token
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub temperature: f64,
    /// Draw from so many of the likeliest tokens; 0: from all
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    /// Draw from the likeliest tokens that together have this probability
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    pub top_p: f64,
    /// Draw from tokens that are at least this share as likely as the likeliest
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub min_p: f64,
    /// Above 1, tokens that are there already become less likely
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    pub repetition_penalty: f64,
    /// Seeds the draws
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Show the token ids that the base is given, on standard error
    #[arg(long)]
    pub verbose_prompt: bool,
    #[command(flatten)]
    pub device: DeviceArgument,
}

#[derive(Debug, Args)]
pub struct Generate {
    #[command(flatten)]
    pub speaking: Speaking,
    /// What to do
    #[arg(long, required_unless_present = "batch", conflicts_with = "batch")]
    pub instruction: Option<String>,
    /// What to do it with
    #[arg(long, default_value = "", conflicts_with = "batch")]
    pub input: String,
    /// JSON Lines to answer: records with instruction and input, messages, or prompt; and perhaps adapter, by name
    #[arg(long, value_name = "FILE", requires = "out")]
    pub batch: Option<PathBuf>,
    /// The same lines, each with its `generated_text`; what it holds already is not made again
    #[arg(long, value_name = "FILE", requires = "batch")]
    pub out: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Chat {
    #[command(flatten)]
    pub speaking: Speaking,
}

#[derive(Debug, Args)]
pub struct Verify {
    /// The folder: a run's, a checkpoint, an adapter, a merged model, or an export
    pub dir: PathBuf,
}

#[derive(Debug, Args)]
pub struct Push {
    /// The folder: an adapter, a merged model, or an export
    pub dir: PathBuf,
    /// The repository; it is made where there is none
    #[arg(long, value_name = "OWNER/NAME")]
    pub repo: String,
    /// The branch, which is made where there is none; left out, main
    #[arg(long, value_name = "BRANCH")]
    pub revision: Option<String>,
    /// Let nobody else see the repository
    #[arg(long)]
    pub private: bool,
    /// What the commit says
    #[arg(long)]
    pub message: Option<String>,
    /// Send it; without, what would be sent is listed
    #[arg(long)]
    pub yes: bool,
}

#[derive(Debug, Args)]
pub struct Inspect {
    #[command(subcommand)]
    pub what: What,
}

#[derive(Debug, Subcommand)]
pub enum What {
    /// A prepared file: its summary, and what in it would spoil a run; or one row's exact tokens
    ///
    /// Exits 1 where a check fails.
    Data {
        /// The prepared file
        file: PathBuf,
        /// The row to show, counted from 0; held-out rows come behind the others
        #[arg(long)]
        row: Option<usize>,
        /// The base whose tokens the file holds; left out, the base it was prepared with
        #[arg(long)]
        base: Option<String>,
        /// Go on where this check fails, such as `one-answer`
        #[arg(long, value_parser = check, value_name = "CHECK")]
        allow: Vec<Check>,
    },
    /// A run: what it is made of, how its loss went, and when it went on
    Run {
        /// The run's folder
        dir: PathBuf,
    },
    /// The logits of every token of a text, as a safetensors file to compare runtimes with
    Logits {
        /// The base: a Hugging Face directory, a GGUF file, or a hub id
        #[arg(long)]
        base: String,
        /// The adapter's directory
        #[arg(long)]
        adapter: Option<PathBuf>,
        /// The text, as it is: no template
        #[arg(long)]
        text: String,
        /// The file to write: `token_ids` int64 and `logits` float32, a row of the vocabulary a token
        #[arg(long)]
        out: PathBuf,
        #[command(flatten)]
        device: DeviceArgument,
    },
}

#[derive(Debug, Args)]
pub struct Synth {
    /// Whose shape: llama-2-7b, llama-2-13b, llama-3-8b, llama-3.2-1b, llama-3.2-3b, tinyllama-1.1b,
    /// smollm2-135m, mistral-7b, qwen2.5-7b, qwen3-8b, gemma-2-9b, gemma-3-4b, phi-3-mini
    #[arg(long, value_name = "NAME")]
    pub like: String,
    /// The directory to write; it must not exist, or be empty
    #[arg(long)]
    pub out: PathBuf,
    /// Seeds the weights
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// nf4 or int8: what the linear layers are written in, instead of bfloat16
    #[arg(long, value_name = "SCHEME")]
    pub quantize: Option<Scheme>,
}

#[derive(Debug, Args)]
pub struct DeviceArgument {
    /// auto, cpu, cuda:N, rocm:N, vulkan:N, metal:N, tch:cpu, tch:cuda:N
    #[arg(long, default_value = "auto")]
    pub device: String,
}

/// A word as a recipe spells it.
fn word<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, serde::de::value::Error> {
    T::deserialize(serde::de::value::StrDeserializer::new(text))
}

fn record_format(text: &str) -> Result<RecordFormat, serde::de::value::Error> {
    word(text)
}

fn check(text: &str) -> Result<Check, serde::de::value::Error> {
    word(text)
}

fn learn(text: &str) -> Result<Learn, serde::de::value::Error> {
    word(text)
}
