//! Merged GGUF files: their numbers, their keys, and what is refused.
#![allow(clippy::unwrap_used)] // a test reports by panicking

mod tiny;

use std::fs;
use std::path::Path;

use pronk_export::{ExportError, GgufMergeOptions, GgufType, MODEL_GGUF, MergeReport, merge_gguf};
use pronk_lora::{Adapter, ForwardMode};
use pronk_model::{Base, Decoder, GgufValue, LoadConfig};
use serde_json::{Value, json};
use tempfile::TempDir;
use tiny::{PROMPT, base, copy, device, golden, json, listing, peft, random};

const FAMILIES: [&str; 6] = ["mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"];

fn merged(
    base: &Base,
    adapter: &Adapter,
    kind: Option<GgufType>,
    out: &Path,
) -> Result<MergeReport, ExportError> {
    let prompt = PROMPT.iter().map(|id| id % base.config.vocab_size as u32).collect();
    let metadata = vec![("tokenizer.ggml.model".to_owned(), GgufValue::String("none".into()))];
    let options = GgufMergeOptions { kind, metadata, prompt };
    merge_gguf(base, adapter, out, &options, &device(), &mut |_, _| {}, &mut |_| Ok(()))
}

/// The tiny checkpoint called `name` with other keys in its configuration.
fn changed(name: &str, changes: &Value, dir: &Path) -> Base {
    copy(name, dir);
    let mut config = json(&dir.join("config.json"));
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    Base::open(dir).unwrap()
}

/// What a GGUF file has no key for: there, a base is as usual.
fn usual(name: &str) -> Value {
    match name {
        "qwen2" => json!({"use_sliding_window": false}),
        "gemma2" | "gemma3" => json!({"query_pre_attn_scalar": 16}),
        _ => json!({}),
    }
}

fn logits(base: &Base, adapter: Option<&Adapter>) -> Vec<f32> {
    let prompt: Vec<u32> = PROMPT.iter().map(|id| id % base.config.vocab_size as u32).collect();
    let decoder = Decoder::load(base, &device(), LoadConfig::default(), |_, _| {}).unwrap();
    decoder.logits(&prompt, ForwardMode::inference(adapter)).try_to_vec_as::<f32>().unwrap()
}

fn difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

#[test]
fn in_float32_every_family_answers_as_base_and_adapter_do() {
    let dir = TempDir::new().unwrap();
    for name in FAMILIES {
        let base = changed(name, &usual(name), &dir.path().join(name));
        let out = dir.path().join(format!("{name}-merged"));
        let adapter = peft(name, &base);
        let report = merged(&base, &adapter, Some(GgufType::F32), &out).unwrap();
        assert_eq!((report.files, report.adapted), (vec![MODEL_GGUF.to_owned()], adapter.pairs.len()));
        let found = Base::open(&out.join(MODEL_GGUF)).unwrap();
        assert!(difference(&logits(&found, None), &logits(&base, Some(&adapter))) < 1e-4, "{name}");
    }
}

#[test]
fn every_kind_of_llama_goes_into_every_type() {
    let dir = TempDir::new().unwrap();
    for variant in ["gqa", "tied", "bias", "head-dim", "rope-linear", "rope-llama3"] {
        let base = base(variant);
        let adapter = random(&base, &["q_proj", "k_proj", "up_proj"], 0.2);
        for kind in GgufType::ALL {
            let out = dir.path().join(format!("{variant}-{kind}"));
            let report = merged(&base, &adapter, Some(kind), &out).unwrap();
            println!("{variant} {kind}: {:?}", report.verification);
            let found = Base::open(&out.join(MODEL_GGUF)).unwrap();
            assert_eq!(found.config, base.config, "{variant} {kind}");
        }
    }
}

/// A GGUF base merged is the same file but for what the adapter changes.
#[test]
fn a_gguf_base_keeps_its_keys_and_its_other_numbers() {
    let dir = TempDir::new().unwrap();
    for name in FAMILIES {
        let base = Base::open(&golden(&format!("{name}.gguf"))).unwrap();
        let (out, adapter) = (dir.path().join(name), random(&base, &["o_proj"], 0.2));
        merged(&base, &adapter, Some(GgufType::Bf16), &out).unwrap();
        let found = Base::open(&out.join(MODEL_GGUF)).unwrap();
        let keys = |base: &Base| {
            let mut keys = base.gguf().unwrap().metadata();
            keys.retain(|(key, _)| {
                !["general.type", "general.file_type", "tokenizer.ggml.model"].contains(&key.as_str())
            });
            format!("{keys:?}")
        };
        assert_eq!(keys(&found), keys(&base), "{name}");
        for tensor in base.shapes().keys() {
            let same = found.read(tensor).unwrap().bytes == base.read(tensor).unwrap().bytes;
            assert_eq!(same, !tensor.ends_with("o_proj.weight"), "{name} {tensor}");
        }
        let version = fs::read(out.join(MODEL_GGUF)).unwrap()[4..8].to_vec();
        assert_eq!(version, 3_u32.to_le_bytes());
    }
}

#[test]
fn the_type_is_the_bases_own_where_none_is_asked_for() {
    let dir = TempDir::new().unwrap();
    for (variant, kind) in [("gqa", 0.0), ("bias", 1.0), ("tied", 32.0)] {
        let base = base(variant);
        let out = dir.path().join(variant);
        merged(&base, &random(&base, &["q_proj"], 0.2), None, &out).unwrap();
        let found = Base::open(&out.join(MODEL_GGUF)).unwrap();
        assert_eq!(found.gguf().unwrap().number("general.file_type"), Some(kind), "{variant}");
    }
}

#[test]
fn what_a_gguf_file_cannot_say_is_refused_and_leaves_nothing() {
    let (dir, bases) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    for (name, word) in [("qwen2", "sliding_window 7"), ("gemma2", "query_pre_attn_scalar")] {
        let base = changed(name, &json!({}), &bases.path().join(name));
        let refusal =
            merged(&base, &peft(name, &base), None, &dir.path().join("a/b")).unwrap_err().to_string();
        assert!(refusal.contains("GGUF") && refusal.contains(word), "{refusal}");
    }
    let base = base("gqa");
    let huge = random(&base, &["q_proj"], 1e6);
    let refusal = merged(&base, &huge, Some(GgufType::F16), &dir.path().join("a/b")).unwrap_err().to_string();
    assert!(refusal.contains("q_proj") && refusal.contains("--gguf-type bf16"), "{refusal}");
    assert_eq!(listing(dir.path()), Vec::<String>::new());
}
