//! GGUF files of every family against the checkpoints that they were made from.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test reports by panicking

mod golden;

use std::fs;
use std::path::Path;

use golden::{Answers, assert_close, devices, host, workspace};
use pronk_lora::ForwardMode;
use pronk_model::{Base, Decoder, Family, LoadConfig};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The families, and what their GGUF files have no key for: there, a base is as usual.
fn families() -> [(&'static str, Value); 6] {
    [
        ("mistral", json!({"sliding_window": null})),
        ("qwen2", json!({"use_sliding_window": false})),
        ("qwen3", json!({})),
        ("gemma2", json!({"query_pre_attn_scalar": 16})),
        ("gemma3", json!({"query_pre_attn_scalar": 16})),
        ("phi3", json!({})),
    ]
}

/// The tiny checkpoint of a family with other keys in its configuration.
fn checkpoint(name: &str, changes: &Value, dir: &Path) -> Base {
    let from = workspace(&format!("tests/golden/tiny-{name}"));
    let text = fs::read(from.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&text).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    fs::copy(from.join("model.safetensors"), dir.join("model.safetensors")).unwrap();
    Base::open(dir).unwrap()
}

#[test]
fn a_gguf_file_holds_what_its_checkpoint_held() {
    for (name, changes) in families() {
        let dir = TempDir::new().unwrap();
        let mut expected = checkpoint(name, &changes, dir.path());
        let found = Base::open(&workspace(&format!("tests/golden/{name}.gguf"))).unwrap();
        if name == "mistral" {
            expected.config.family = Family::Llama; // llama.cpp knows no other name for it
        }
        assert_eq!(found.config, expected.config, "{name}");
        for (tensor, shape) in expected.config.tensors() {
            let [a, b] = [&found, &expected].map(|base| base.read(&tensor).unwrap());
            assert_eq!((&a.shape, &b.shape), (&shape, &shape), "{name} {tensor}");
            let difference =
                a.to_f32().iter().zip(b.to_f32()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(difference < 1e-7, "{name} {tensor}: {difference}");
        }
    }
}

#[test]
fn a_gguf_file_answers_as_its_checkpoint_does() {
    for (device_name, device) in devices() {
        for (name, changes) in families() {
            let dir = TempDir::new().unwrap();
            let bases = [
                Base::open(&workspace(&format!("tests/golden/{name}.gguf"))).unwrap(),
                checkpoint(name, &changes, dir.path()),
            ];
            let token_ids = Answers::read(&format!("tiny-{name}/expected.safetensors")).ids("token_ids");
            let [found, expected] = bases.map(|base| {
                let decoder = Decoder::load(&base, &device, LoadConfig::default(), |_, _| {}).unwrap();
                host(decoder.logits(&token_ids, ForwardMode::inference(None)))
            });
            assert_close(&format!("{name}.gguf on {device_name}"), &found, &expected, 1e-5);
            if changes == json!({}) {
                let answers = Answers::read(&format!("tiny-{name}/expected.safetensors")).floats("logits");
                assert_close(&format!("{name}.gguf on {device_name}, transformers"), &found, &answers, 1e-4);
            }
        }
    }
}
