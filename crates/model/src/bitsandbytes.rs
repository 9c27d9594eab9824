//! Quantized matrices as bitsandbytes stores them in a Hugging Face directory: several tensors that
//! make up one. Names and layouts are those of its `QuantState.as_dict` and of `Linear8bitLt`.

use bytes::Bytes;
use pronk_kernels::{
    DYNAMIC_MAP, FrozenError, FrozenMatrix, NF4_CODEBOOK, Nf4Parts, Nf4QuantState, Nf4Scales,
};
use pronk_lora::LM_HEAD;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::mapped::Pages;
use crate::safetensors_files::SafetensorsFiles;
use crate::{Quantization, Scheme};

/// The key in `config.json`.
pub const QUANTIZATION_CONFIG: &str = "quantization_config";

/// In it, the modules that are not quantized, in 4 bits either.
const SKIP_MODULES: &str = "llm_int8_skip_modules";

/// What stands behind the weight's name in NF4.
pub const ABSMAX: &str = ".absmax";
pub const QUANT_MAP: &str = ".quant_map";
pub const NESTED_ABSMAX: &str = ".nested_absmax";
pub const NESTED_QUANT_MAP: &str = ".nested_quant_map";
pub const QUANT_STATE: &str = ".quant_state.bitsandbytes__nf4";
/// What stands behind the module's name in int8.
pub const SCB: &str = ".SCB";
pub const WEIGHT_FORMAT: &str = ".weight_format";

/// How far a published map may be from ours: bitsandbytes has computed it on several devices.
const MAP_TOLERANCE: f32 = 1e-5;

/// How the weights that a `config.json` speaks of are quantized, or what about it is not read here.
pub fn stored_scheme(config: &Map<String, Value>) -> Result<Option<Scheme>, String> {
    let found = match config.get(QUANTIZATION_CONFIG) {
        None | Some(Value::Null | Value::Bool(false)) => return Ok(None),
        Some(found) => found,
    };
    let flag = |key: &str| found.get(key) == Some(&Value::Bool(true));
    let text = |key: &str, default| found.get(key).map_or(Some(default), Value::as_str);
    let (four, eight) = (flag("load_in_4bit"), flag("load_in_8bit"));
    // transformers takes the method and the type that it does not find for these.
    match (text("quant_method", "bitsandbytes"), four, eight, text("bnb_4bit_quant_type", "fp4")) {
        (Some("bitsandbytes"), true, false, Some("nf4")) => Ok(Some(Scheme::Nf4)),
        (Some("bitsandbytes"), false, true, _) => Ok(Some(Scheme::Int8)),
        _ => Err(format!(
            "{QUANTIZATION_CONFIG}: {found} is not supported; of quantized checkpoints, those of quant_method \
             \"bitsandbytes\" are, in 8 bits, or in 4 bits with bnb_4bit_quant_type \"nf4\""
        )),
    }
}

/// The layers of the blocks that the weights' `config.json` says have been left as they were.
pub fn stored_skip_modules(config: &Map<String, Value>) -> Vec<String> {
    let names = config.get(QUANTIZATION_CONFIG).and_then(|found| found.get(SKIP_MODULES)?.as_array());
    let names = names.into_iter().flatten().filter_map(Value::as_str);
    names.filter(|name| *name != LM_HEAD).map(str::to_owned).collect()
}

/// What `config.json` says about weights that were quantized so, as transformers reads it.
pub fn quantization_config(quantization: &Quantization) -> Value {
    let Quantization { scheme, skip_modules } = quantization;
    let scheme = *scheme;
    let mut config = json!({
        "quant_method": "bitsandbytes",
        "load_in_4bit": scheme == Scheme::Nf4,
        "load_in_8bit": scheme == Scheme::Int8,
    });
    if scheme == Scheme::Nf4 {
        config["bnb_4bit_quant_type"] = "nf4".into();
        config["bnb_4bit_use_double_quant"] = true.into();
        config["bnb_4bit_compute_dtype"] = "bfloat16".into();
        config["bnb_4bit_quant_storage"] = "uint8".into();
    }
    if !skip_modules.is_empty() {
        // Without a list, the head is left out by itself.
        let names = skip_modules.iter().map(String::as_str).chain([LM_HEAD]);
        config[SKIP_MODULES] = names.collect();
    }
    config
}

/// A matrix put together from its tensors.
#[derive(Debug)]
pub struct StoredMatrix {
    pub matrix: FrozenMatrix,
    /// Where the tensors lie that products need.
    pub pages: Vec<Pages>,
}

/// Puts the matrix called `weight` together, and takes its tensors out of `files`. All that is
/// wrong with them is told at once.
pub fn gather(
    scheme: Scheme,
    weight: &str,
    files: &mut SafetensorsFiles,
) -> Result<StoredMatrix, Vec<String>> {
    let mut parts = Parts { files, pages: Vec::new(), problems: Vec::new() };
    let matrix = match scheme {
        Scheme::Nf4 => nf4(weight, &mut parts),
        Scheme::Int8 => int8(weight, &mut parts),
    };
    match matrix {
        Some(matrix) if parts.problems.is_empty() => Ok(StoredMatrix { matrix, pages: parts.pages }),
        _ => Err(parts.problems),
    }
}

fn nf4(weight: &str, parts: &mut Parts) -> Option<FrozenMatrix> {
    let part = |name: &str| format!("{weight}{name}");
    let codes = parts.needed(weight, Dtype::U8);
    let json = parts.read(&part(QUANT_STATE), Dtype::U8);
    let state = json.map(|json| Nf4QuantState::from_json(&json));
    let state = state.and_then(|state| parts.checked(weight, state));
    parts.map(&part(QUANT_MAP), &NF4_CODEBOOK);
    let nested =
        state.as_ref().map_or(parts.files.has(&part(NESTED_ABSMAX)), |s| s.nested_blocksize.is_some());
    let scales = if nested {
        let absmax = parts.needed(&part(ABSMAX), Dtype::U8);
        let nested_absmax = parts.needed(&part(NESTED_ABSMAX), Dtype::F32);
        parts.map(&part(NESTED_QUANT_MAP), &DYNAMIC_MAP);
        let nested_offset = state.as_ref().and_then(|state| state.nested_offset)? as f32;
        Nf4Scales::Double { absmax: absmax?, nested_absmax: nested_absmax?, nested_offset }
    } else {
        Nf4Scales::Plain { absmax: parts.needed(&part(ABSMAX), Dtype::F32)? }
    };
    let &[rows, cols] = &state?.shape[..] else { return None };
    let matrix = FrozenMatrix::nf4([rows, cols], Nf4Parts { codes: codes?, scales });
    parts.checked(weight, matrix)
}

fn int8(weight: &str, parts: &mut Parts) -> Option<FrozenMatrix> {
    let module = weight.strip_suffix(".weight").unwrap_or(weight);
    let shape = parts.files.shape(weight);
    let codes = parts.needed(weight, Dtype::I8);
    let scales = parts.needed(&format!("{module}{SCB}"), Dtype::F32);
    let format = format!("{module}{WEIGHT_FORMAT}");
    // Older versions left it out where the codes lie row by row, and newer ones know no other way.
    if parts.files.has(&format)
        && let Some(found) = parts.read(&format, Dtype::U8).filter(|found| found[..] != [0])
    {
        parts.problems.push(format!("{format}: expected 0, rows one after another, found {:?}", &found[..]));
    }
    let Some(&[rows, cols]) = shape.as_deref() else {
        parts.problems.push(format!("{weight}: expected a matrix of codes, found shape {shape:?}"));
        return None;
    };
    let matrix = FrozenMatrix::int8([rows, cols], codes?, scales?);
    parts.checked(weight, matrix)
}

/// The tensors of one matrix.
struct Parts<'a> {
    files: &'a mut SafetensorsFiles,
    pages: Vec<Pages>,
    problems: Vec<String>,
}

impl Parts<'_> {
    /// A tensor that products need.
    fn needed(&mut self, name: &str, dtype: Dtype) -> Option<Bytes> {
        let pages = self.take(name, dtype)?;
        let bytes = pages.bytes();
        self.pages.push(pages);
        Some(bytes)
    }

    /// A tensor that is read once.
    fn read(&mut self, name: &str, dtype: Dtype) -> Option<Bytes> {
        let pages = self.take(name, dtype)?;
        Some(pages.bytes())
    }

    fn take(&mut self, name: &str, dtype: Dtype) -> Option<Pages> {
        match self.files.take(name) {
            None => self.problems.push(format!("{name}: missing, expected a tensor in {dtype:?}")),
            Some((_, found)) if found != dtype => {
                self.problems.push(format!("{name}: expected {dtype:?}, found {found:?}"));
            }
            Some((pages, _)) => return Some(pages),
        }
        None
    }

    /// A map that is a constant here. One that is another would give other numbers.
    fn map(&mut self, name: &str, expected: &[f32]) {
        let Some(bytes) = self.read(name, Dtype::F32) else { return };
        let found: Vec<f32> = bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= MAP_TOLERANCE * b.abs();
        if found.len() != expected.len() || !found.iter().zip(expected).all(near) {
            self.problems
                .push(format!("{name}: expected bitsandbytes' {} numbers, found others", expected.len()));
        }
    }

    fn checked<T>(&mut self, weight: &str, result: Result<T, FrozenError>) -> Option<T> {
        result.map_err(|e| self.problems.push(format!("{weight}: {e}"))).ok()
    }
}
