//! `adapter_config.json`.

use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{ADAPTER_CONFIG, misfit, read_text};
use crate::{Adapter, AllLinear, InitLoraWeights, LoftQConfig, LoraConfig, LoraError, TargetModules};

/// Only keys that every PEFT version since 0.6 accepts: older ones fail on keys they do not know.
pub fn to_json(adapter: &Adapter, base: &str) -> String {
    let config = &adapter.config;
    // PEFT and Ollama know alpha as an integer; a fraction is written only where there is one.
    let alpha = if config.alpha.fract() == 0.0 { json!(config.alpha as i64) } else { json!(config.alpha) };
    let mut value = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "target_modules": adapter.target_names(),
        "use_rslora": config.rslora,
        "bias": config.bias,
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "inference_mode": true,
        "modules_to_save": modules_to_save(adapter),
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
    });
    if let Some(loftq) = &config.loftq_config {
        // PEFT reads it where init_lora_weights is "loftq" alone, and would then quantize the base anew.
        value["loftq_config"] = json!(loftq);
    }
    if config.ensure_weight_tying && adapter.embeddings().is_some() {
        value["ensure_weight_tying"] = json!(true);
    }
    if config.use_dora {
        value["use_dora"] = json!(true);
    }
    if !config.layers_to_transform.is_empty() {
        value["layers_to_transform"] = json!(config.layers_to_transform);
    }
    if !config.exclude_modules.is_empty() {
        value["exclude_modules"] = json!(config.exclude_modules);
    }
    format!("{value:#}\n")
}

/// Last parts of the names of what is trained whole: of two that are tied, both, for readers that know nothing of
/// tying.
fn modules_to_save(adapter: &Adapter) -> Option<Vec<&'static str>> {
    let saved = [("embed_tokens", adapter.embeddings()), ("lm_head", adapter.head())];
    let saved: Vec<_> = saved.into_iter().filter_map(|(name, weight)| weight.map(|_| name)).collect();
    (!saved.is_empty()).then_some(saved)
}

/// What base the adapter in `dir` says it belongs to.
pub fn base_of(dir: &Path) -> Result<Option<String>, LoraError> {
    let path = dir.join(ADAPTER_CONFIG);
    let value: Value = serde_json::from_slice(&read_text(&path)?)
        .map_err(|e| LoraError::Malformed { path, problem: e.to_string() })?;
    Ok(value["base_model_name_or_path"].as_str().map(str::to_owned))
}

/// The quantized base that the adapter in `dir` belongs to, where it is not a base as it was.
pub fn loftq_config_of(dir: &Path) -> Result<Option<LoftQConfig>, LoraError> {
    Ok(load(dir)?.loftq_config)
}

/// The configuration, with a refusal by name of everything that would change the result.
pub fn load(dir: &Path) -> Result<LoraConfig, LoraError> {
    let path = dir.join(ADAPTER_CONFIG);
    let malformed = |problem: String| LoraError::Malformed { path: path.clone(), problem };
    let mut value: Value =
        serde_json::from_slice(&read_text(&path)?).map_err(|e| malformed(e.to_string()))?;
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
    // Layers are found by the number in their modules' names, which comes behind "layers".
    let layers_pattern = &value["layers_pattern"];
    if !is_off(layers_pattern) && *layers_pattern != "layers" && *layers_pattern != json!(["layers"]) {
        refused.push(format!("layers_pattern: {layers_pattern} is not supported"));
    }
    if value["layers_to_transform"].is_number() {
        value["layers_to_transform"] = json!([value["layers_to_transform"]]);
    }
    if !refused.is_empty() {
        return Err(misfit(dir, refused));
    }
    let number = |key: &str, default: f64| match &value[key] {
        Value::Null => Ok(default),
        v => v.as_f64().ok_or_else(|| malformed(format!("{key}: expected a number, found {v}"))),
    };
    let target_modules = match &value["target_modules"] {
        // PEFT knows the word in capitals too.
        Value::String(word) if word.eq_ignore_ascii_case("all-linear") => {
            TargetModules::Word(AllLinear::AllLinear)
        }
        found => TargetModules::deserialize(found)
            .map_err(|e| malformed(format!("target_modules: {e}, found {found}")))?,
    };
    let config = LoraConfig {
        rank: number("r", 8.0)? as usize,
        alpha: number("lora_alpha", 8.0)?,
        dropout: number("lora_dropout", 0.0)?,
        target_modules,
        rslora: value["use_rslora"] == true,
        use_dora: value["use_dora"] == true,
        init_lora_weights: InitLoraWeights::Default,
        restore_rank: 0,
        loftq_config: loftq_config(&path, &value)?,
        rank_pattern: or_default(&path, &value, "rank_pattern")?,
        alpha_pattern: or_default(&path, &value, "alpha_pattern")?,
        layers_to_transform: or_default(&path, &value, "layers_to_transform")?,
        exclude_modules: or_default(&path, &value, "exclude_modules")?,
        modules_to_save: or_default(&path, &value, "modules_to_save")?,
        ensure_weight_tying: value["ensure_weight_tying"] == true,
        bias: or_default(&path, &value, "bias")?,
    };
    config.validate().map_err(|e| malformed(e.to_string()))?;
    Ok(config)
}

/// PEFT writes an empty table where there is none.
fn loftq_config(path: &Path, value: &Value) -> Result<Option<LoftQConfig>, LoraError> {
    if is_off(&value["loftq_config"]) { Ok(None) } else { or_default(path, value, "loftq_config") }
}

/// What stands under `key`, or what it is by default.
fn or_default<T: Default + DeserializeOwned>(path: &Path, value: &Value, key: &str) -> Result<T, LoraError> {
    match &value[key] {
        Value::Null => Ok(T::default()),
        found => T::deserialize(found).map_err(|e| LoraError::Malformed {
            path: path.into(),
            problem: format!("{key}: {e}, found {found}"),
        }),
    }
}

/// Keys of PEFT's that change what an adapter computes and that this version does not carry.
const UNSUPPORTED: [&str; 11] = [
    "fan_in_fan_out",
    "layer_replication",
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
