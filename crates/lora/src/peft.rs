//! Adapter directories in the layout of Hugging Face's PEFT: `adapter_config.json` and
//! `adapter_model.safetensors`.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Write;
use std::path::Path;

use atomic_write_file::AtomicWriteFile;
use burn::tensor::{Device, Tensor, TensorData};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

use crate::{Adapter, LoraConfig, LoraError, LoraPair, ModuleShape, TargetModules};

/// File name of the configuration.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// File name of the weights.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

const PREFIX: &str = "base_model.model.";
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";

/// A factor on the host: its key in the file, its shape, its numbers.
type HostFactor = (String, [usize; 2], Vec<f32>);

impl Adapter {
    /// Writes the adapter into `dir`, each file beside its name and then renamed, and reads the
    /// weights back. `base` is what `base_model_name_or_path` will say.
    ///
    /// Refuses numbers that are not finite and, unless `fresh`, an adapter whose B is all zero:
    /// it would be the base again, under another name.
    ///
    /// A directory that was not there before is there afterwards with both files, or not at all.
    pub fn save(&self, dir: &Path, base: &str, fresh: bool) -> Result<(), LoraError> {
        let existed = dir.exists();
        let saved = self.save_files(dir, base, fresh);
        if saved.is_err() && !existed {
            let _ = fs::remove_dir_all(dir); // it may not even have been made
        }
        saved
    }

    fn save_files(&self, dir: &Path, base: &str, fresh: bool) -> Result<(), LoraError> {
        let weights = dir.join(ADAPTER_WEIGHTS);
        let not_saved = |problem: String| LoraError::NotSaved { path: weights.clone(), problem };
        let tensors = self.host_tensors()?;
        if tensors.iter().any(|(_, _, values)| values.iter().any(|x| !x.is_finite())) {
            return Err(not_saved("it holds numbers that are not finite".into()));
        }
        let zero = |(name, _, values): &HostFactor| !name.ends_with(B) || values.iter().all(|&x| x == 0.0);
        if !fresh && tensors.iter().all(zero) {
            return Err(not_saved("every B is zero after training, so nothing was learned".into()));
        }
        let bytes = serialize(&tensors).map_err(|e| not_saved(e.to_string()))?;
        fs::create_dir_all(dir).map_err(|source| LoraError::Io { path: dir.into(), source })?;
        write(&dir.join(ADAPTER_CONFIG), config_json(&self.config, &self.target_names(), base).as_bytes())?;
        write(&weights, &bytes)?;
        if read(&weights)? != bytes {
            return Err(not_saved("the file reads back different from what was written".into()));
        }
        Ok(())
    }

    /// Reads an adapter directory that PEFT, or this crate, has written, and checks it against
    /// the base's `modules`.
    pub fn load(dir: &Path, modules: &[ModuleShape], device: &Device) -> Result<Self, LoraError> {
        let config = load_config(dir)?;
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
        for module in config.target_modules.select(modules)? {
            let mut factor = |half: &str, shape: [usize; 2]| {
                let key = format!("{PREFIX}{}{half}", module.name);
                match tensors.remove(&key) {
                    None => problems.push(format!("{key}: missing")),
                    Some((found, _)) if found != shape => {
                        problems.push(format!("{key}: expected shape {shape:?}, found {found:?}"));
                    }
                    Some((_, values)) => {
                        return Some(Tensor::from_data(TensorData::new(values, shape), device));
                    }
                }
                None
            };
            let a = factor(A, [config.rank, module.in_features]);
            let b = factor(B, [module.out_features, config.rank]);
            if let (Some(a), Some(b)) = (a, b) {
                pairs.insert(module.name.clone(), LoraPair { a, b });
            }
        }
        let mut surplus: Vec<_> = tensors.into_keys().collect();
        surplus.sort();
        problems
            .extend(surplus.iter().map(|key| format!("{key}: belongs to no targeted module of the base")));
        if problems.is_empty() { Ok(Self { config, pairs }) } else { Err(misfit(dir, problems)) }
    }

    /// Every factor on the host, by its key in the file.
    fn host_tensors(&self) -> Result<Vec<HostFactor>, LoraError> {
        let host = |name: &str, half: &str, tensor: &Tensor<2>| {
            let values = tensor.try_to_vec_as::<f32>().map_err(|e| LoraError::Malformed {
                path: name.into(),
                problem: format!("cannot be read from the device ({e})"),
            })?;
            Ok((format!("{PREFIX}{name}{half}"), tensor.dims(), values))
        };
        let halves = self.pairs.iter().flat_map(|(name, p)| [host(name, A, &p.a), host(name, B, &p.b)]);
        halves.collect()
    }

    fn target_names(&self) -> Vec<String> {
        let modules: Vec<ModuleShape> =
            self.pairs.iter().map(|(name, p)| ModuleShape::new(name, p.a.dims()[1], p.b.dims()[0])).collect();
        self.config.target_modules.spelled_out(&modules.iter().collect::<Vec<_>>())
    }
}

fn serialize(tensors: &[HostFactor]) -> Result<Vec<u8>, safetensors::SafeTensorError> {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(_, _, v)| v.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, shape, _), data)| Ok((name, TensorView::new(Dtype::F32, shape.to_vec(), data)?)))
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

/// Only keys that every PEFT version since 0.6 accepts: older ones fail on keys they do not know.
fn config_json(config: &LoraConfig, targets: &[String], base: &str) -> String {
    // PEFT and Ollama know alpha as an integer; a fraction is written only where there is one.
    let alpha = if config.alpha.fract() == 0.0 { json!(config.alpha as i64) } else { json!(config.alpha) };
    let value = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "target_modules": targets,
        "use_rslora": config.rslora,
        "bias": "none",
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "inference_mode": true,
        "modules_to_save": null,
        "rank_pattern": {},
        "alpha_pattern": {},
    });
    format!("{value:#}\n")
}

/// The configuration, with a refusal by name of everything that would change the result.
fn load_config(dir: &Path) -> Result<LoraConfig, LoraError> {
    let path = dir.join(ADAPTER_CONFIG);
    let malformed = |problem: String| LoraError::Malformed { path: path.clone(), problem };
    let value: Value = serde_json::from_slice(&read(&path)?).map_err(|e| malformed(e.to_string()))?;
    if value["peft_type"] != "LORA" {
        return Err(malformed(format!("expected peft_type \"LORA\", found {}", value["peft_type"])));
    }
    let mut refused: Vec<String> = UNSUPPORTED
        .iter()
        .filter(|key| !is_off(&value[**key]))
        .map(|key| format!("{key}: {} is not supported", value[*key]))
        .collect();
    let init = value["init_lora_weights"].as_str().unwrap_or_default();
    if CHANGES_BASE.iter().any(|way| init.to_lowercase().starts_with(way)) {
        refused.push(format!("init_lora_weights: \"{init}\" changes the base as well and is not supported"));
    }
    if !refused.is_empty() {
        return Err(misfit(dir, refused));
    }
    let number = |key: &str, default: f64| match &value[key] {
        Value::Null => Ok(default),
        v => v.as_f64().ok_or_else(|| malformed(format!("{key}: expected a number, found {v}"))),
    };
    let target_modules: TargetModules = serde_json::from_value(value["target_modules"].clone())
        .map_err(|e| malformed(format!("target_modules: {e}, found {}", value["target_modules"])))?;
    let config = LoraConfig {
        rank: number("r", 8.0)? as usize,
        alpha: number("lora_alpha", 8.0)?,
        dropout: number("lora_dropout", 0.0)?,
        target_modules,
        rslora: value["use_rslora"] == true,
    };
    config.validate().map_err(|e| malformed(e.to_string()))?;
    Ok(config)
}

/// Keys of PEFT's that change what an adapter computes and that this version does not carry.
const UNSUPPORTED: [&str; 18] = [
    "use_dora",
    "bias",
    "fan_in_fan_out",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layer_replication",
    "exclude_modules",
    "trainable_token_indices",
    "target_parameters",
    "lora_bias",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "megatron_config",
    "kasa_config",
    "arrow_config",
];

/// Initializations for which PEFT also rewrites the base's weights when it loads the adapter: over
/// the base as it is, such factors compute something else.
const CHANGES_BASE: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

/// Null, false, "none", and what is empty all mean that a feature is not used.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(s) => s == "none" || s.is_empty(),
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
        _ => false,
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
