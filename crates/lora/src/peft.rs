//! Adapter directories in the layout of Hugging Face's PEFT: `adapter_config.json` and
//! `adapter_model.safetensors`.

mod config_file;

pub use config_file::{base_of, loftq_config_of};

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{ErrorKind, Read};
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use half::{bf16, f16};
use safetensors::tensor::{TensorView, View};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::tensors::numbers;
use crate::{
    Adapter, EMBED_TOKENS, LM_HEAD, LoraConfig, LoraError, LoraPair, ModuleShape, TargetModules, TensorKind,
    TensorName,
};

/// File name of the configuration.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// File name of the weights.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

const PREFIX: &str = "base_model.model.";

/// A tensor on the host: what it is, its shape, its numbers.
type HostTensor = (TensorName, [usize; 2], Vec<f32>);

/// A tensor's key in the file. PEFT keeps the base's own layer, and its bias, within an adapted one.
fn key(name: &TensorName, is_adapted: bool) -> String {
    match name.kind {
        TensorKind::A | TensorKind::B => format!("{PREFIX}{name}.weight"),
        TensorKind::Bias if is_adapted => format!("{PREFIX}{}{OF_ADAPTED}", name.module),
        TensorKind::Magnitude | TensorKind::Weight | TensorKind::Bias => format!("{PREFIX}{name}"),
    }
}

/// What the key of an adapted layer's bias ends in.
const OF_ADAPTED: &str = ".base_layer.bias";

/// What PEFT writes beside embeddings and head where it finds that the base was resized: what they were, and what they
/// are once more.
const SAVED_TWICE: [&str; 2] = [".original_module.weight", ".modules_to_save.weight"];

/// An adapter as its files will be, in the host's memory: whatever becomes of its tensors meanwhile.
#[derive(Debug, Clone)]
pub struct AdapterFiles {
    config: String,
    weights: Vec<u8>,
}

impl AdapterFiles {
    /// The bytes of the file of weights.
    pub fn weights(&self) -> &[u8] {
        &self.weights
    }

    /// Writes them as [`Adapter::save`] does.
    pub fn write(&self, dir: &Path) -> Result<(), LoraError> {
        let existed = dir.exists();
        let written = self.write_both(dir);
        if written.is_err() && !existed {
            let _ = fs::remove_dir_all(dir); // it may not even have been made
        }
        written
    }

    fn write_both(&self, dir: &Path) -> Result<(), LoraError> {
        fs::create_dir_all(dir).map_err(|source| LoraError::Io { path: dir.into(), source })?;
        write(&dir.join(ADAPTER_CONFIG), self.config.as_bytes())?;
        write(&dir.join(ADAPTER_WEIGHTS), &self.weights)
    }
}

impl Adapter {
    /// Writes the adapter into `dir`, each file beside its name and then renamed, and reads the
    /// weights back. `base` is what `base_model_name_or_path` will say.
    ///
    /// Refuses numbers that are not finite and, unless `fresh`, an adapter whose B is all zero:
    /// it would be the base again, under another name.
    ///
    /// Where embeddings and head are trained as one, both are written, as PEFT does: readers that know nothing of
    /// `ensure_weight_tying` find all they need.
    ///
    /// Where something is fixed beside pairs, what is written is the [standalone](Self::standalone) adapter.
    ///
    /// A directory that was not there before is there afterwards with both files, or not at all.
    pub fn save(&self, dir: &Path, base: &str, fresh: bool) -> Result<(), LoraError> {
        self.files(dir, base, fresh)?.write(dir)
    }

    /// What [`Adapter::save`] would write now, for who writes it later or on another thread.
    pub fn files(&self, dir: &Path, base: &str, fresh: bool) -> Result<AdapterFiles, LoraError> {
        let not_saved = |problem: String| LoraError::NotSaved { path: dir.join(ADAPTER_WEIGHTS), problem };
        let adapter = self.standalone();
        let tensors = adapter.host_tensors()?;
        if tensors.iter().any(|(_, _, values)| values.iter().any(|x| !x.is_finite())) {
            return Err(LoraError::NotFinite { path: dir.join(ADAPTER_WEIGHTS) });
        }
        if !fresh {
            self.must_have_learned(dir)?;
        }
        let config = config_file::to_json(&adapter, base);
        // It has copies of its own where something is fixed.
        drop(adapter);
        let weights = serialize(&tensors, |name| self.pairs.contains_key(&name.module))
            .map_err(|e| not_saved(e.to_string()))?;
        Ok(AdapterFiles { config, weights })
    }

    /// Refuses an adapter whose B, as far as it is trained, is all zero. `dir` is where it was to be saved.
    pub fn must_have_learned(&self, dir: &Path) -> Result<(), LoraError> {
        for (module, pair) in &self.pairs {
            let b = numbers(TensorName::new(module, TensorKind::B), &pair.b)?;
            if b.iter().any(|&x| x != 0.0) {
                return Ok(());
            }
        }
        let problem = "every B is zero after training, so nothing was learned".into();
        Err(LoraError::NotSaved { path: dir.join(ADAPTER_WEIGHTS), problem })
    }

    /// Reads an adapter directory that PEFT, or this crate, has written, and checks it against
    /// the base's `modules`.
    pub fn load(dir: &Path, modules: &[ModuleShape], device: &Device) -> Result<Self, LoraError> {
        let expected = |config: LoraConfig, file: &SafeTensors| Expected::of_base(config, modules, file);
        Self::load_expected(dir, expected, device)
    }

    /// Reads an adapter directory without its base: the modules are those that the file has tensors of.
    pub fn load_alone(dir: &Path, device: &Device) -> Result<Self, LoraError> {
        Self::load_expected(dir, |config, file| Ok(Expected::of_file(config, file)), device)
    }

    fn load_expected(
        dir: &Path,
        expect: impl FnOnce(LoraConfig, &SafeTensors) -> Result<Expected, LoraError>,
        device: &Device,
    ) -> Result<Self, LoraError> {
        let config = config_file::load(dir)?;
        let path = dir.join(ADAPTER_WEIGHTS);
        let bytes = read(&path)?;
        let file = parse(&path, &bytes)?;
        let Expected { config, adapted, whole, ties } = expect(config, &file)?;
        let mut tensors = FileTensors::of(&file, device);
        let mut pairs = BTreeMap::new();
        for module in &adapted {
            let rank = config.rank_of(&module.name);
            let mut tensor = |kind, shape| tensors.take(&TensorName::new(&module.name, kind), true, shape);
            let a = tensor(TensorKind::A, [rank, module.in_features]);
            let b = tensor(TensorKind::B, [module.out_features, rank]);
            let magnitude =
                config.use_dora.then(|| tensor(TensorKind::Magnitude, [1, module.out_features])).flatten();
            if let (Some(a), Some(b)) = (a, b) {
                let scale = config.scale_of(&module.name);
                pairs.insert(module.name.clone(), LoraPair { a, b, scale, magnitude, fixed: None });
            }
        }
        if ties {
            tensors.drop_twin();
        }
        let whole = whole.into_iter().filter_map(|(name, shape)| {
            let is_adapted = pairs.contains_key(&name.module);
            let tensor = tensors.take(&name, is_adapted, shape)?;
            Some((name, tensor))
        });
        let whole = whole.collect();
        let adapter = Self { config: LoraConfig { ensure_weight_tying: ties, ..config }, pairs, whole };
        let mut problems = tensors.problems();
        problems.extend(adapter.vocabulary_problem());
        if problems.is_empty() { Ok(adapter) } else { Err(misfit(dir, problems)) }
    }

    /// Tokens that have an embedding or a logit, and not the other.
    fn vocabulary_problem(&self) -> Option<String> {
        let rows = |weight: Option<&Tensor<2>>| weight.map(|weight| weight.dims()[0]);
        let (embeddings, head) = (rows(self.embeddings())?, rows(self.head())?);
        (embeddings != head)
            .then(|| format!("{EMBED_TOKENS} has {embeddings} rows, {LM_HEAD} {head}: expected as many"))
    }

    /// Every tensor on the host, as files hold them.
    fn host_tensors(&self) -> Result<Vec<HostTensor>, LoraError> {
        let twin = self.head().filter(|_| self.config.ensure_weight_tying);
        let twin = twin.map(|weight| (TensorName::new(LM_HEAD, TensorKind::Weight), weight));
        let host = |(name, tensor): (TensorName, &Tensor<2>)| {
            let values = numbers(&name, tensor)?;
            Ok((name, tensor.dims(), values))
        };
        self.tensors().chain(twin).map(host).collect()
    }

    fn target_names(&self) -> TargetModules {
        let modules: Vec<ModuleShape> =
            self.pairs.iter().map(|(name, p)| ModuleShape::new(name, p.a.dims()[1], p.b.dims()[0])).collect();
        self.config.target_modules.spelled_out(&modules.iter().collect::<Vec<_>>())
    }
}

/// What a file has to hold.
struct Expected {
    /// With `modules_to_save` as the file has them.
    config: LoraConfig,
    /// Modules with a pair.
    adapted: Vec<ModuleShape>,
    /// What is trained whole, with the shapes of the base's own.
    whole: BTreeMap<TensorName, [usize; 2]>,
    /// Whether embeddings and head are one.
    ties: bool,
}

impl Expected {
    fn of_base(config: LoraConfig, modules: &[ModuleShape], file: &SafeTensors) -> Result<Self, LoraError> {
        let adapted = config.select(modules)?.into_iter().cloned().collect();
        // Of a base that was given more tokens PEFT saves embeddings and head, whatever `modules_to_save` says.
        let resized = config.modules_to_save.is_empty();
        let saved = modules.iter().filter(|module| {
            resized && file.tensor(&key(&TensorName::new(&module.name, TensorKind::Weight), false)).is_ok()
        });
        let saved = saved.map(|module| module.name.clone()).collect();
        let config = if resized {
            LoraConfig { modules_to_save: saved, ensure_weight_tying: true, ..config }
        } else {
            config
        };
        let (whole, ties) = (config.whole(modules)?, config.ties(modules));
        Ok(Self { config, adapted, whole, ties })
    }

    fn of_file(config: LoraConfig, file: &SafeTensors) -> Self {
        let mut whole = BTreeMap::new();
        for (key, view) in file.tensors() {
            let Some(key) = key.strip_prefix(PREFIX) else { continue };
            let bias = key.strip_suffix(OF_ADAPTED).or_else(|| key.strip_suffix(".bias"));
            let weight = [EMBED_TOKENS, LM_HEAD].into_iter().find(|m| key == format!("{m}.weight"));
            match (bias, weight, view.shape()) {
                (Some(module), _, &[out]) => {
                    whole.insert(TensorName::new(module, TensorKind::Bias), [1, out]);
                }
                (_, Some(module), &[rows, columns]) => {
                    whole.insert(TensorName::new(module, TensorKind::Weight), [rows, columns]);
                }
                _ => {}
            }
        }
        if config.ensure_weight_tying {
            whole.remove(&TensorName::new(LM_HEAD, TensorKind::Weight));
        }
        let ties = config.ensure_weight_tying;
        Self { config, adapted: modules_of(file), whole, ties }
    }
}

/// The tensors of a file by their keys, and what is wrong with them.
struct FileTensors<'a> {
    tensors: HashMap<String, TensorView<'a>>,
    problems: Vec<String>,
    device: &'a Device,
}

impl<'a> FileTensors<'a> {
    fn of(file: &SafeTensors<'a>, device: &'a Device) -> Self {
        let (mut tensors, mut problems) = (HashMap::new(), Vec::new());
        for (key, view) in file.tensors() {
            match view.dtype() {
                _ if SAVED_TWICE.iter().any(|end| key.ends_with(end)) => {}
                Dtype::F32 | Dtype::F16 | Dtype::BF16 => drop(tensors.insert(key, view)),
                other => {
                    problems.push(format!("{key}: expected float32, float16 or bfloat16, found {other:?}"));
                }
            }
        }
        Self { tensors, problems, device }
    }

    /// A tensor that must be there in this shape. A whole weight may have more rows: tokens were added to it.
    fn take(&mut self, name: &TensorName, is_adapted: bool, shape: [usize; 2]) -> Option<Tensor<2>> {
        let key = key(name, is_adapted);
        let Some(view) = self.tensors.remove(&key) else {
            self.problems.push(format!("{key}: missing"));
            return None;
        };
        let found = view.shape();
        let shape = match *found {
            [rows, _] if name.kind == TensorKind::Weight => [rows.max(shape[0]), shape[1]],
            _ => shape,
        };
        let expected = name.kind.shape_in_file(shape);
        if found != expected {
            self.problems.push(format!("{key}: expected shape {expected:?}, found {found:?}"));
            return None;
        }
        Some(Tensor::from_data(TensorData::new(to_f32(&view), shape), self.device))
    }

    /// The head, where it is the embeddings again.
    fn drop_twin(&mut self) {
        let key = |module| key(&TensorName::new(module, TensorKind::Weight), false);
        let (embeddings, head) = (key(EMBED_TOKENS), key(LM_HEAD));
        match (self.tensors.remove(&head), self.tensors.get(&embeddings)) {
            (Some(twin), Some(weight)) if twin.data() != weight.data() => self.problems.push(format!(
                "{head}: expected the numbers of {embeddings}, which it is tied to, found others"
            )),
            (Some(twin), None) => drop(self.tensors.insert(embeddings, twin)),
            _ => {}
        }
    }

    /// All that is wrong, with what nobody has taken.
    fn problems(self) -> Vec<String> {
        let mut surplus: Vec<_> = self.tensors.into_keys().collect();
        surplus.sort();
        let surplus = surplus.iter().map(|key| format!("{key}: belongs to no targeted module of the base"));
        self.problems.into_iter().chain(surplus).collect()
    }
}

/// The vocabulary of the adapter in `dir`, where it brings one of its own: the rows of its embeddings, or of its
/// head.
pub fn vocab_size_of(dir: &Path) -> Result<Option<usize>, LoraError> {
    let path = dir.join(ADAPTER_WEIGHTS);
    let header = header(&path)?;
    let rows = |module| {
        let key = key(&TensorName::new(module, TensorKind::Weight), false);
        header[key]["shape"][0].as_u64().map(|rows| rows as usize)
    };
    Ok(rows(LM_HEAD).or_else(|| rows(EMBED_TOKENS)))
}

/// What stands in front of a safetensors file's numbers, which may be many.
fn header(path: &Path) -> Result<Value, LoraError> {
    let read = || -> std::io::Result<Vec<u8>> {
        let file = pronk_files::open(path)?;
        let (mut length, mut header) = (Vec::new(), Vec::new());
        (&file).take(8).read_to_end(&mut length)?;
        let length = length.as_slice().try_into().map_or(0, u64::from_le_bytes);
        file.take(length).read_to_end(&mut header)?;
        Ok(header)
    };
    let header = read().map_err(|source| LoraError::Io { path: path.into(), source })?;
    serde_json::from_slice(&header).map_err(|e| LoraError::Malformed {
        path: path.into(),
        problem: format!("not a whole safetensors file ({e})"),
    })
}

fn parse<'a>(path: &Path, bytes: &'a [u8]) -> Result<SafeTensors<'a>, LoraError> {
    SafeTensors::deserialize(bytes).map_err(|e| LoraError::Malformed {
        path: path.into(),
        problem: format!("not a whole safetensors file ({e})"),
    })
}

/// The modules that `file` has both factors of, in the order of their names.
fn modules_of(file: &SafeTensors) -> Vec<ModuleShape> {
    let dimension = |key: &str, at: usize| file.tensor(key).ok()?.shape().get(at).copied();
    let end = format!(".{}.weight", TensorKind::A);
    let module = |name: &str| {
        let module = name.strip_prefix(PREFIX)?.strip_suffix(&end)?;
        let rows = dimension(&key(&TensorName::new(module, TensorKind::B), true), 0)?;
        Some(ModuleShape::new(module, dimension(name, 1)?, rows))
    };
    let mut modules: Vec<ModuleShape> = file.names().into_iter().filter_map(module).collect();
    modules.sort_by(|x, y| x.name.cmp(&y.name));
    modules
}

fn serialize(
    tensors: &[HostTensor],
    is_adapted: impl Fn(&TensorName) -> bool,
) -> Result<Vec<u8>, safetensors::SafeTensorError> {
    let views = tensors.iter().map(|(name, shape, values)| {
        (key(name, is_adapted(name)), FileView { shape: name.kind.shape_in_file(*shape), values })
    });
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize(views, Some(metadata))
}

/// A tensor on its way into a file, whose bytes are made when they are written: one at a time.
struct FileView<'a> {
    shape: Vec<usize>,
    values: &'a [f32],
}

impl View for FileView<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.values.iter().flat_map(|x| x.to_le_bytes()).collect()
    }

    fn data_len(&self) -> usize {
        size_of_val(self.values)
    }
}

/// The numbers of a tensor of floats.
fn to_f32(view: &TensorView) -> Vec<f32> {
    let halves = || view.data().as_chunks::<2>().0.iter();
    match view.dtype() {
        Dtype::F16 => halves().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::BF16 => halves().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        _ => view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
    }
}

fn misfit(dir: &Path, problems: Vec<String>) -> LoraError {
    LoraError::DoesNotFit { path: dir.into(), problems }
}

fn read_text(path: &Path) -> Result<Vec<u8>, LoraError> {
    pronk_files::read_text(path).map_err(|source| LoraError::Io { path: path.into(), source })
}

fn read(path: &Path) -> Result<Vec<u8>, LoraError> {
    pronk_files::read(path).map_err(|source| LoraError::Io { path: path.into(), source })
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), LoraError> {
    pronk_files::write(path, bytes).map_err(|source| match source.kind() {
        ErrorKind::InvalidData => LoraError::NotSaved { path: path.into(), problem: source.to_string() },
        _ => LoraError::Io { path: path.into(), source },
    })
}
