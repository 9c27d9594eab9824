//! The merged model's `config.json`: the base's, for old readers and new ones.

use pronk_model::{Base, DecoderConfig};
use serde_json::{Map, Value};

use crate::{Dtype, ExportError};

/// File name of the configuration.
pub const CONFIG: &str = "config.json";

/// Names of the rotary embedding's settings before transformers 5 and since.
const ROPE: [&str; 4] = ["rope_theta", "rope_local_base_freq", "rope_scaling", "rope_parameters"];

/// What generation starts and ends with, beside its key in a GGUF file.
const SPECIAL_TOKENS: [(&str, &str); 3] = [
    ("bos_token_id", "tokenizer.ggml.bos_token_id"),
    ("eos_token_id", "tokenizer.ggml.eos_token_id"),
    ("pad_token_id", "tokenizer.ggml.padding_token_id"),
];

/// Every key of the base's configuration, as they are for `merged`, and beside each key that has two names the other
/// one. `dtype` is `None` where the base's formats are kept.
pub fn config_json(base: &Base, merged: &DecoderConfig, dtype: Option<Dtype>) -> Result<Value, ExportError> {
    let ours = dtype.unwrap_or(Dtype::of_file(base.dtype())).torch_name();
    let mut fresh = merged.to_json(ours);
    if let Some(gguf) = base.gguf() {
        for (key, gguf_key) in SPECIAL_TOKENS {
            if let Some(id) = gguf.number(gguf_key) {
                fresh[key] = Value::from(id as u64);
            }
        }
        return Ok(fresh);
    }
    let path = base.path.join(CONFIG);
    let text = pronk_files::read_text(&path).map_err(ExportError::io(&path))?;
    let mut config: Map<String, Value> = serde_json::from_slice(&text).map_err(|e| {
        ExportError::Malformed { path: path.clone(), problem: format!("expected a JSON object ({e})") }
    })?;
    let known = |config: &Map<String, Value>, key: &str| config.get(key).is_some_and(|v| !v.is_null());
    for key in ROPE {
        if let (false, Some(ours)) = (known(&config, key), fresh.get(key)) {
            config.insert(key.into(), ours.clone());
        }
    }
    if merged.vocab_size != base.config.vocab_size {
        config.insert("vocab_size".into(), merged.vocab_size.into());
    }
    if merged.tie_word_embeddings != base.config.tie_word_embeddings {
        config.insert("tie_word_embeddings".into(), merged.tie_word_embeddings.into());
    }
    // A `rope_parameters` that leaves theta to `rope_theta` is complete only for some readers.
    if let (Some(Value::Object(nested)), Value::Object(complete)) =
        (config.get_mut("rope_parameters"), &fresh["rope_parameters"])
    {
        for (key, value) in complete {
            nested.entry(key.clone()).or_insert_with(|| value.clone());
        }
    }
    // The merged weights are not quantized any more, nor in the format of what was not.
    let dequantized = config.remove("quantization_config").is_some_and(|found| !found.is_null());
    let kept = ["dtype", "torch_dtype"].into_iter().find_map(|key| match (dtype, config.get(key)) {
        (None, Some(Value::String(name))) if !dequantized => Some(name.clone()),
        _ => None,
    });
    let name = Value::from(kept.unwrap_or_else(|| ours.to_owned()));
    config.insert("dtype".into(), name.clone());
    config.insert("torch_dtype".into(), name);
    Ok(Value::Object(config))
}
