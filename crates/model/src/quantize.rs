//! A base quantized once, in a cache: a Hugging Face directory as bitsandbytes would have written it,
//! which is mapped from then on.

mod key;
mod manifest;
mod stream;
mod tensor;

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::str::FromStr;

use pronk_kernels::Format;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::bitsandbytes::{QUANTIZATION_CONFIG, quantization_config};
use crate::mapped::Pages;
use crate::{Base, ModelError, ShardSpec, Staging, WeightsWriter};
use key::Key;

// Whoever writes a quantized checkpoint of something else than a base needs no more than these.
pub(crate) use stream::QuantizedStream;
pub(crate) use tensor::QuantizedTensor;

/// Bytes of a file at most, as transformers splits them.
const SHARD_BYTES: usize = 5_000_000_000;

/// How a base is quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scheme {
    /// 4-bit normal floats, a scale for every 64 numbers, the scales in 8 bits (`QLoRA`).
    Nf4,
    /// 8 bits, a scale for every row (`LLM.int8()`).
    Int8,
}

impl Scheme {
    /// Every scheme, smallest first.
    pub const ALL: [Self; 2] = [Self::Nf4, Self::Int8];

    /// Bits of a number.
    pub fn bits(self) -> u8 {
        match self {
            Self::Nf4 => 4,
            Self::Int8 => 8,
        }
    }

    /// What it makes of a matrix.
    pub fn format(self) -> Format {
        match self {
            Self::Nf4 => Format::Nf4,
            Self::Int8 => Format::Int8,
        }
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nf4 => "nf4",
            Self::Int8 => "int8",
        })
    }
}

impl FromStr for Scheme {
    type Err = ModelError;

    fn from_str(name: &str) -> Result<Self, ModelError> {
        let known = Self::ALL.into_iter().find(|scheme| scheme.to_string() == name);
        known.ok_or_else(|| ModelError::UnknownScheme {
            found: name.into(),
            known: Self::ALL.map(|scheme| scheme.to_string()).join(" or "),
        })
    }
}

/// What becomes of a base's linear layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quantization {
    /// What they are quantized to.
    pub scheme: Scheme,
    /// Which of them stay in 16 bits: those whose names begin or end so, as transformers understands
    /// `llm_int8_skip_modules`.
    pub skip_modules: Vec<String>,
}

impl From<Scheme> for Quantization {
    fn from(scheme: Scheme) -> Self {
        Self { scheme, skip_modules: Vec::new() }
    }
}

impl Quantization {
    /// What the tensor called `name`, a matrix of a block or none, is quantized to.
    pub(crate) fn of(&self, name: &str) -> Option<Scheme> {
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let skipped = self.skip_modules.iter().any(|skip| selects(skip, module));
        (name.starts_with("model.layers.") && !skipped).then_some(self.scheme)
    }

    /// The format that a matrix of the base, which has it in `format`, will be kept in.
    pub(crate) fn format_of(&self, name: &str, format: Format) -> Format {
        match (self.of(name), format) {
            (Some(scheme), _) => scheme.format(),
            (None, Format::F32) => Format::Bf16,
            (None, kept) => kept,
        }
    }

    /// Refuses to skip what is not there.
    pub(crate) fn check(&self, base: &Base) -> Result<(), ModelError> {
        let modules = base.config.linear_modules();
        let matches = |skip: &String| modules.iter().any(|module| selects(skip, &module.name));
        match self.skip_modules.iter().find(|skip| skip.is_empty() || !matches(skip)) {
            None => Ok(()),
            Some(skip) => {
                let names = modules.iter().filter_map(|module| module.name.rsplit('.').next());
                let known: BTreeSet<&str> = names.collect();
                Err(ModelError::UnknownModule {
                    found: skip.clone(),
                    known: known.into_iter().collect::<Vec<_>>().join(", "),
                })
            }
        }
    }
}

fn selects(skip: &str, module: &str) -> bool {
    module.ends_with(skip) || module.starts_with(skip)
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { scheme, skip_modules } = self;
        match &skip_modules[..] {
            [] => write!(f, "{scheme}"),
            names => write!(f, "{scheme}, but for {}", names.join(", ")),
        }
    }
}

/// A base whose blocks' linear layers are quantized, and where it comes from.
#[derive(Debug)]
pub struct QuantizedBase {
    /// The base; its path is that of the cache.
    pub base: Base,
    /// Where it comes from.
    pub origin: Origin,
}

/// Where a quantized base comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// It was quantized with this very scheme already, and is not in the cache.
    AsItWas,
    /// The cache, which held it whole.
    Cache,
    /// It has been quantized just now.
    Quantized,
    /// The same, because what the cache held was not it, for the reason given.
    QuantizedAnew(String),
}

/// Quantizes the linear layers of `base`'s blocks, once: what comes of it is kept in a
/// directory in `cache`, and opened from there, mapped, ever after. Embeddings, head and skipped layers are kept
/// in 16 bits, norms and biases as they are.
///
/// One tensor at a time is in memory. `progress` hears how many bytes of weights are written and
/// how many there will be; where it breaks, the result is [`ModelError::Interrupted`]. Whatever
/// fails leaves nothing behind. A cache that is not whole, or is that of another base, is made
/// anew.
pub fn quantized(
    base: &Base,
    quantization: impl Into<Quantization>,
    cache: &Path,
    mut progress: impl FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<QuantizedBase, ModelError> {
    let quantization = quantization.into();
    quantization.check(base)?;
    if let Some(found) = base.quantization() {
        let wanted = quantization.scheme.to_string();
        let as_it_is = found == wanted && base.skip_modules() == quantization.skip_modules;
        if base.gguf().is_none() && as_it_is {
            return Ok(QuantizedBase { base: Base::open(&base.path)?, origin: Origin::AsItWas });
        }
        return Err(ModelError::AlreadyQuantized { path: base.path.clone(), found, wanted });
    }
    let key = Key::of(base, &quantization)?;
    let dir = cache.join(key.name());
    let mut origin = Origin::Quantized;
    if dir.exists() {
        match open(&dir, &key) {
            Ok(base) => return Ok(QuantizedBase { base, origin: Origin::Cache }),
            Err(reason) => origin = Origin::QuantizedAnew(reason),
        }
        fs::remove_dir_all(&dir).map_err(ModelError::io(&dir))?;
    }
    match write(base, &quantization, &dir, &key, &mut progress) {
        // Another process may have been faster: then the same lies there already.
        Err(e @ ModelError::Destination { .. }) => match open(&dir, &key) {
            Ok(base) => Ok(QuantizedBase { base, origin: Origin::Cache }),
            Err(_) => Err(e),
        },
        Err(e) => Err(e),
        Ok(()) => Ok(QuantizedBase { base: Base::open(&dir)?, origin }),
    }
}

/// The cached base in `dir`, or why that is not what `key` stands for.
fn open(dir: &Path, key: &Key) -> Result<Base, String> {
    manifest::check(dir, key)?;
    Base::open(dir).map_err(|e| e.to_string())
}

fn write(
    base: &Base,
    quantization: &Quantization,
    dir: &Path,
    key: &Key,
    progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
) -> Result<(), ModelError> {
    let tensors = plan(base, quantization)?;
    let mut stream = QuantizedStream::new(&base.path, &tensors);
    let specs = stream.specs();
    let total = specs.iter().map(|spec| spec.bytes() as u64).sum();
    let staging = Staging::beside(dir, None)?;
    let mut writer = WeightsWriter::new(&staging, ShardSpec::split(specs, SHARD_BYTES));
    staging.add_file("config.json", format!("{:#}\n", config_json(base, quantization)?).as_bytes())?;
    for file in key::companions(base) {
        let bytes = pronk_files::read(&file).map_err(ModelError::io(&file))?;
        staging.add_file(&file.file_name().unwrap_or_default().to_string_lossy(), &bytes)?;
    }
    let mut done = 0;
    for tensor in &tensors {
        if progress(done, total).is_break() {
            return Err(ModelError::Interrupted);
        }
        stream.write(tensor, base.read(&tensor.name)?, &mut |name, bytes| writer.write(name, bytes))?;
        base.pages(&tensor.name).iter().for_each(Pages::release);
        done += tensor.specs().iter().map(|spec| spec.bytes() as u64).sum::<u64>();
    }
    if progress(done, total).is_break() {
        return Err(ModelError::Interrupted);
    }
    writer.finish()?;
    manifest::write(&staging, key, base)?;
    staging.publish()
}

/// How the base's tensors are going to be kept.
fn plan(base: &Base, quantization: &Quantization) -> Result<Vec<QuantizedTensor>, ModelError> {
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let source = match (base.gguf(), &shape[..]) {
            // `read` would give them in float32.
            (Some(_), [_, _]) => match base.matrix(&name)?.format() {
                Format::F16 => Dtype::F16,
                Format::Bf16 => Dtype::BF16,
                _ => Dtype::F32,
            },
            _ => base.dtype_of(&name)?,
        };
        Ok(QuantizedTensor::new(quantization.of(&name), name, shape, source))
    };
    base.config.tensors().into_iter().map(tensor).collect()
}

/// The base's configuration, and how its weights are quantized now.
fn config_json(base: &Base, quantization: &Quantization) -> Result<Value, ModelError> {
    let mut config: Value = if base.gguf().is_some() {
        base.config.to_json("bfloat16")
    } else {
        let path = base.path.join("config.json");
        let text = pronk_files::read_text(&path).map_err(ModelError::io(&path))?;
        serde_json::from_slice(&text).map_err(|e| ModelError::malformed(&path, e.to_string()))?
    };
    for key in ["dtype", "torch_dtype"] {
        // What is not quantized is kept in 16 bits now.
        if config.get(key).is_none_or(|found| found == "float32") {
            config[key] = "bfloat16".into();
        }
    }
    config[QUANTIZATION_CONFIG] = quantization_config(quantization);
    Ok(config)
}
