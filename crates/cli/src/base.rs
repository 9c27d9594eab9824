//! `BASE` on the command line: a path or a hub id becomes an opened base with its tokenizer.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use hf_hub::RepoType;
use miette::{IntoDiagnostic, Result, WrapErr, miette};
use pronk_data::{PromptTemplate, TextTokenizer};
use pronk_kernels::open_device;
use pronk_lora::{ADAPTER_WEIGHTS, Adapter, loftq_config_of, vocab_size_of};
use pronk_model::{Base, Decoder, LoadConfig, ModelError, Origin, Quantization, Scheme, quantized};

use crate::gguf_keys::vocabulary;
use crate::hub::Pinned;
use crate::progress;
use crate::recipe::Recipe;
use crate::terminal::{note, print};

/// A base with its tokenizer, on the disk.
pub struct OpenedBase {
    pub base: Base,
    pub tokenizer: TextTokenizer,
    /// As it was named: what an adapter says it belongs to.
    pub name: String,
    /// How many tokens have embeddings: the base's, and those that were added to them.
    pub vocab_size: usize,
}

/// Opens `name`: a path relative to `folder`, or a hub id.
pub fn open(name: &str, folder: &Path) -> Result<OpenedBase> {
    let path = locate(name, folder)?;
    let base = Base::open(&path).into_diagnostic()?;
    if let Some(message) = base.note() {
        note(&message);
    }
    let tokenizer = match base.gguf() {
        Some(file) => TextTokenizer::from_gguf(&vocabulary(file)),
        None => TextTokenizer::from_dir(&path),
    };
    let tokenizer = tokenizer.into_diagnostic().wrap_err_with(|| format!("the tokenizer of {name}"))?;
    let vocab_size = base.config.vocab_size;
    Ok(OpenedBase { base, tokenizer, name: name.to_owned(), vocab_size })
}

/// The base of `recipe`, with the tokens of the adapter that it starts from, and those that it adds.
pub fn of_recipe(recipe: &Recipe) -> Result<OpenedBase> {
    let opened = open(&recipe.base.path, Path::new("."))?;
    let opened =
        recipe.lora.init_adapter.iter().try_fold(opened, |opened, dir| opened.with_tokens_of(dir))?;
    opened.with_tokens(&recipe.tokens.add)
}

/// Where the base called `name` lies: a path relative to `folder`, or the hub's cache once it is fetched.
fn locate(name: &str, folder: &Path) -> Result<PathBuf> {
    let path = folder.join(name);
    if path.exists() {
        return Ok(path);
    }
    let mut parts = name.split('/');
    let is_word = |part: Option<&str>| part.is_some_and(|p| !p.is_empty() && !p.starts_with('.'));
    let is_hub_id = is_word(parts.next()) && is_word(parts.next()) && parts.next().is_none();
    let gguf = Path::new(name).extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    if !is_hub_id || gguf {
        return Err(miette!(
            "{}: no such base; expected a Hugging Face directory, a .gguf file, or a hub id such as \
             meta-llama/Llama-2-7b-hf",
            path.display()
        ));
    }
    download(name)
        .wrap_err_with(|| {
            format!(
                "{name}: there is no such path, and as a hub id it could not be fetched. Without a network, give \
                 the path of a downloaded directory; a gated model needs its licence accepted and HF_TOKEN set"
            )
        })
}

/// A base's name as other programs know it: of a hub id, not the revision behind it.
pub fn without_revision(name: &str) -> &str {
    match name.rsplit_once('@') {
        Some((id, _)) if !Path::new(name).exists() => id,
        _ => name,
    }
}

/// Fetches a model repository's files, all of one revision, into the hub cache; those that are there already stay.
fn download(name: &str) -> Result<PathBuf> {
    let id = without_revision(name);
    let revision = name.strip_prefix(id).and_then(|rest| rest.strip_prefix('@'));
    let repo = Pinned::find(id, RepoType::Model, revision)?;
    let all = &repo.files;
    // PyTorch's own files hold the same weights again, where there are safetensors.
    let weights = if all.iter().any(|name| name.ends_with(".safetensors")) { ".safetensors" } else { ".bin" };
    let wanted = |name: &&String| {
        let kept = [".json", weights, ".jinja", "tokenizer.model"];
        !name.contains('/') && kept.iter().any(|end| name.ends_with(end))
    };
    for name in all.iter().filter(wanted) {
        repo.get(name)?;
    }
    let config = repo.get("config.json")?;
    print(&format!("base      {id}@{}\n", repo.sha));
    Ok(config.parent().unwrap_or(Path::new(".")).to_owned())
}

/// The template called `name`; left out, the one that lies with the adapter, else the base's own, else alpaca.
pub fn template(
    name: Option<&str>,
    adapter: Option<&Path>,
    tokenizer: &TextTokenizer,
) -> Result<PromptTemplate> {
    let stored = match (name, adapter) {
        (None, Some(dir)) => PromptTemplate::of_adapter(dir, tokenizer).into_diagnostic()?,
        _ => None,
    };
    if let Some(template) = stored {
        return Ok(template);
    }
    let own = if tokenizer.chat_template().is_some() { "chat" } else { "alpaca" };
    PromptTemplate::load(name.unwrap_or(own), tokenizer).into_diagnostic()
}

/// Where quantized bases are kept: `PRONK_CACHE`, or `pronk` in the user's own cache.
fn cache_dir() -> Result<PathBuf> {
    match std::env::var_os("PRONK_CACHE").filter(|dir| !dir.is_empty()) {
        Some(dir) => Ok(dir.into()),
        None => dirs::cache_dir().map(|dir| dir.join("pronk")).ok_or_else(|| {
            miette!("this user has no cache directory; set PRONK_CACHE to one for quantized bases")
        }),
    }
}

impl OpenedBase {
    /// A name that still finds this base from another folder: an absolute path, or the hub id.
    pub fn lasting_name(&self) -> String {
        let path = Path::new(&self.name);
        let absolute = path.exists().then(|| std::path::absolute(path).ok()).flatten();
        absolute.map_or_else(|| self.name.clone(), |path| path.display().to_string())
    }

    /// The same with its linear layers quantized, out of the cache, or with a bar while that is
    /// made. Nothing where `stop` was set meanwhile.
    pub fn quantized(self, quantization: &Quantization, stop: &AtomicBool) -> Result<Option<Self>> {
        let Some((quantized, origin)) = self.quantize(quantization, stop)? else { return Ok(None) };
        let path = quantized.base.path.display();
        match origin {
            Origin::AsItWas => print(&format!("base      it is quantized to {quantization} as it is\n")),
            Origin::Cache => print(&format!("base      quantized to {quantization}, from {path}\n")),
            Origin::Quantized => print(&format!("base      quantized to {quantization}, kept in {path}\n")),
            Origin::QuantizedAnew(reason) => {
                print(&format!("base      quantized to {quantization} anew, in {path}: {reason}\n"));
            }
        }
        Ok(Some(quantized))
    }

    /// The same with `tokens` added to it, which is said.
    fn with_tokens(mut self, tokens: &[String]) -> Result<Self> {
        self.tokenizer.add_tokens(tokens).into_diagnostic()?;
        let added: Vec<(u32, &String)> =
            tokens.iter().filter_map(|token| Some((self.tokenizer.token_id(token)?, token))).collect();
        let Some((last, _)) = added.last() else { return Ok(self) };
        self.vocab_size = self.vocab_size.max(*last as usize + 1);
        let shown: Vec<String> = added.iter().map(|(id, token)| format!("{token} is {id}")).collect();
        print(&format!(
            "tokens    {}: embeddings and head are trained whole (lora.modules_to_save)\n",
            shown.join(", ")
        ));
        Ok(self)
    }

    /// The same with the tokens that lie with the adapter in `dir`.
    fn with_tokens_of(mut self, dir: &Path) -> Result<Self> {
        if dir.join(ADAPTER_WEIGHTS).exists() {
            self.tokenizer.add_tokens_of(dir).into_diagnostic()?;
            self.vocab_size = self.vocab_size.max(vocab_size_of(dir).into_diagnostic()?.unwrap_or(0));
        }
        Ok(self)
    }

    /// The base that the adapter in `dir` belongs to: this one with the tokens that lie there; where the adapter
    /// makes up for what quantizing takes away, this one quantized.
    pub fn of_adapter(self, dir: &Path) -> Result<Self> {
        let opened = self.with_tokens_of(dir)?;
        opened.quantized_for(dir)
    }

    fn quantized_for(self, dir: &Path) -> Result<Self> {
        let Some(of) = loftq_config_of(dir).into_diagnostic()? else { return Ok(self) };
        let scheme = Scheme::ALL.into_iter().find(|scheme| scheme.bits() == of.loftq_bits);
        let (Some(scheme), None) = (scheme, self.base.quantization()) else { return Ok(self) };
        let quantization = Quantization { scheme, skip_modules: of.skip_modules };
        note(&format!(
            "{} belongs to {} quantized to {quantization}, which is taken",
            dir.display(),
            self.name
        ));
        let quantized = self.quantize(&quantization, &AtomicBool::new(false))?;
        quantized.map(|(quantized, _)| quantized).ok_or_else(|| miette!("stopped"))
    }

    fn quantize(mut self, quantization: &Quantization, stop: &AtomicBool) -> Result<Option<(Self, Origin)>> {
        let cache = cache_dir()?;
        let bar = progress::bar("quantizing megabytes", 0);
        let found = quantized(&self.base, quantization.clone(), &cache, |done, total| {
            bar.set_length(total / 1_000_000);
            bar.set_position(done / 1_000_000);
            if stop.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        bar.finish_and_clear();
        let found = match found {
            Err(ModelError::Interrupted) => return Ok(None),
            found => found.into_diagnostic()?,
        };
        self.base = found.base;
        Ok(Some((self, found.origin)))
    }

    /// Reads the weights onto `device`, with a bar.
    pub fn load(&self, device: &str, config: LoadConfig) -> Result<Decoder> {
        let device = open_device(device).into_diagnostic()?;
        let bar = progress::bar("reading the base", self.base.config.tensors().len());
        let decoder = Decoder::load(&self.base, &device, config, |done, _| bar.set_position(done as u64));
        bar.finish_and_clear();
        decoder.into_diagnostic()
    }

    /// An adapter for this base.
    pub fn load_adapter(&self, dir: &Path, decoder: &Decoder) -> Result<Adapter> {
        Adapter::load(dir, &self.base.config.adapter_modules(), decoder.device()).into_diagnostic()
    }

    /// A tokenizer may know more tokens than there are embeddings for.
    pub fn must_embed(&self, highest: Option<u32>) -> Result<()> {
        self.must_embed_within(self.vocab_size, highest)
    }

    /// The same of `vocab_size` embeddings: one adapter's.
    pub fn must_embed_within(&self, vocab_size: usize, highest: Option<u32>) -> Result<()> {
        match highest {
            Some(id) if id as usize >= vocab_size => Err(miette!(
                "{}: the tokenizer gives token {id}, but the base has embeddings for {vocab_size} tokens only",
                self.name
            )),
            _ => Ok(()),
        }
    }
}
