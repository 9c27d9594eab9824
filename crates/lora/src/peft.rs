//! Adapter directories in the layout of Hugging Face's PEFT: `adapter_config.json` and
//! `adapter_model.safetensors`.

mod config_file;

pub use config_file::{base_of, quantized_bits_of};

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Write;
use std::path::Path;

use atomic_write_file::AtomicWriteFile;
use burn::tensor::{Device, Tensor, TensorData};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use crate::{Adapter, Factor, LoraConfig, LoraError, LoraPair, ModuleShape, TargetModules, TensorName};

/// File name of the configuration.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// File name of the weights.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

const PREFIX: &str = "base_model.model.";

/// A tensor on the host: what it is, its shape, its numbers.
type HostTensor = (TensorName, [usize; 2], Vec<f32>);

/// A tensor's key in the file.
fn key(name: &TensorName) -> String {
    let end = if name.factor == Factor::Magnitude { "" } else { ".weight" };
    format!("{PREFIX}{name}{end}")
}

/// A tensor's shape in the file: one row is a vector there.
fn file_shape(factor: Factor, [rows, columns]: [usize; 2]) -> Vec<usize> {
    if factor == Factor::Magnitude { vec![columns] } else { vec![rows, columns] }
}

/// An adapter as its files will be, in the host's memory: whatever becomes of its tensors meanwhile.
#[derive(Debug, Clone)]
pub struct AdapterFiles {
    config: String,
    weights: Vec<u8>,
}

impl AdapterFiles {
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
        let path = dir.join(ADAPTER_WEIGHTS);
        write(&path, &self.weights)?;
        if read(&path)? != self.weights {
            let problem = "the file reads back different from what was written".into();
            return Err(LoraError::NotSaved { path, problem });
        }
        Ok(())
    }
}

impl Adapter {
    /// Writes the adapter into `dir`, each file beside its name and then renamed, and reads the
    /// weights back. `base` is what `base_model_name_or_path` will say.
    ///
    /// Refuses numbers that are not finite and, unless `fresh`, an adapter whose B is all zero:
    /// it would be the base again, under another name.
    ///
    /// Where pairs have a start beside them, what is written is the [standalone](Self::standalone) adapter.
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
            return Err(not_saved("it holds numbers that are not finite".into()));
        }
        let zero =
            |(name, _, values): &HostTensor| name.factor != Factor::B || values.iter().all(|&x| x == 0.0);
        if !fresh && tensors.iter().all(zero) {
            return Err(not_saved("every B is zero after training, so nothing was learned".into()));
        }
        let weights = serialize(&tensors).map_err(|e| not_saved(e.to_string()))?;
        let config = config_file::to_json(&adapter.config, &adapter.target_names(), base);
        Ok(AdapterFiles { config, weights })
    }

    /// Reads an adapter directory that PEFT, or this crate, has written, and checks it against
    /// the base's `modules`.
    pub fn load(dir: &Path, modules: &[ModuleShape], device: &Device) -> Result<Self, LoraError> {
        let chosen = |config: &LoraConfig, _: &SafeTensors| {
            Ok(config.select(modules)?.into_iter().cloned().collect::<Vec<_>>())
        };
        Self::load_chosen(dir, chosen, device)
    }

    /// Reads an adapter directory without its base: the modules are those that the file has factors of.
    pub fn load_alone(dir: &Path, device: &Device) -> Result<Self, LoraError> {
        Self::load_chosen(dir, |_, file| Ok(modules_of(file)), device)
    }

    fn load_chosen(
        dir: &Path,
        choose: impl FnOnce(&LoraConfig, &SafeTensors) -> Result<Vec<ModuleShape>, LoraError>,
        device: &Device,
    ) -> Result<Self, LoraError> {
        let config = config_file::load(dir)?;
        let path = dir.join(ADAPTER_WEIGHTS);
        let bytes = read(&path)?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| LoraError::Malformed {
            path: path.clone(),
            problem: format!("not a whole safetensors file ({e})"),
        })?;
        let mut problems = Vec::new();
        let mut tensors = HashMap::new();
        for (key, view) in file.tensors() {
            match to_f32(&view) {
                Some(values) => drop(tensors.insert(key, (view.shape().to_vec(), values))),
                None => problems
                    .push(format!("{key}: expected float32, float16 or bfloat16, found {:?}", view.dtype())),
            }
        }
        let mut pairs = BTreeMap::new();
        for module in choose(&config, &file)? {
            let rank = config.rank_of(&module.name);
            let mut tensor = |factor, shape: [usize; 2]| {
                let key = key(&TensorName::new(&module.name, factor));
                match tensors.remove(&key) {
                    None => problems.push(format!("{key}: missing")),
                    Some((found, _)) if found != file_shape(factor, shape) => {
                        let shape = file_shape(factor, shape);
                        problems.push(format!("{key}: expected shape {shape:?}, found {found:?}"));
                    }
                    Some((_, values)) => {
                        return Some(Tensor::from_data(TensorData::new(values, shape), device));
                    }
                }
                None
            };
            let a = tensor(Factor::A, [rank, module.in_features]);
            let b = tensor(Factor::B, [module.out_features, rank]);
            let magnitude =
                config.use_dora.then(|| tensor(Factor::Magnitude, [1, module.out_features])).flatten();
            if let (Some(a), Some(b)) = (a, b) {
                let scale = config.scale_of(&module.name);
                pairs.insert(module.name.clone(), LoraPair { a, b, scale, magnitude, start: None });
            }
        }
        let mut surplus: Vec<_> = tensors.into_keys().collect();
        surplus.sort();
        problems
            .extend(surplus.iter().map(|key| format!("{key}: belongs to no targeted module of the base")));
        if problems.is_empty() { Ok(Self { config, pairs }) } else { Err(misfit(dir, problems)) }
    }

    /// Every tensor on the host.
    fn host_tensors(&self) -> Result<Vec<HostTensor>, LoraError> {
        let host = |(name, tensor): (TensorName, &Tensor<2>)| match tensor.try_to_vec_as::<f32>() {
            Ok(values) => Ok((name, tensor.dims(), values)),
            Err(e) => Err(LoraError::Malformed {
                path: name.to_string().into(),
                problem: format!("cannot be read from the device ({e})"),
            }),
        };
        self.tensors().map(host).collect()
    }

    fn target_names(&self) -> TargetModules {
        let modules: Vec<ModuleShape> =
            self.pairs.iter().map(|(name, p)| ModuleShape::new(name, p.a.dims()[1], p.b.dims()[0])).collect();
        self.config.target_modules.spelled_out(&modules.iter().collect::<Vec<_>>())
    }
}

/// The modules that `file` has both factors of, in the order of their names.
fn modules_of(file: &SafeTensors) -> Vec<ModuleShape> {
    let dimension = |key: &str, at: usize| file.tensor(key).ok()?.shape().get(at).copied();
    let end = format!(".{}.weight", Factor::A);
    let module = |name: &str| {
        let module = name.strip_prefix(PREFIX)?.strip_suffix(&end)?;
        let rows = dimension(&key(&TensorName::new(module, Factor::B)), 0)?;
        Some(ModuleShape::new(module, dimension(name, 1)?, rows))
    };
    let mut modules: Vec<ModuleShape> = file.names().into_iter().filter_map(module).collect();
    modules.sort_by(|x, y| x.name.cmp(&y.name));
    modules
}

fn serialize(tensors: &[HostTensor]) -> Result<Vec<u8>, safetensors::SafeTensorError> {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(_, _, v)| v.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, shape, _), data)| {
            Ok((key(name), TensorView::new(Dtype::F32, file_shape(name.factor, *shape), data)?))
        })
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize(views, Some(metadata))
}

fn to_f32(view: &TensorView) -> Option<Vec<f32>> {
    let halves = || view.data().chunks_exact(2).map(|b| [b[0], b[1]]);
    match view.dtype() {
        Dtype::F32 => {
            Some(view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        }
        Dtype::F16 => Some(halves().map(|b| f16::from_le_bytes(b).to_f32()).collect()),
        Dtype::BF16 => Some(halves().map(|b| bf16::from_le_bytes(b).to_f32()).collect()),
        _ => None,
    }
}

fn misfit(dir: &Path, problems: Vec<String>) -> LoraError {
    LoraError::DoesNotFit { path: dir.into(), problems }
}

fn read(path: &Path) -> Result<Vec<u8>, LoraError> {
    fs::read(path).map_err(|source| LoraError::Io { path: path.into(), source })
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), LoraError> {
    let write = || {
        let mut file = AtomicWriteFile::open(path)?;
        file.write_all(bytes)?;
        file.commit()
    };
    write().map_err(|source| LoraError::Io { path: path.into(), source })
}
