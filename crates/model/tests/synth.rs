//! Synthetic bases: of the right shape, with the right distribution, and always the same.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test reports by panicking

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use pronk_model::{Base, DecoderConfig, Scheme, Shape, quantized, synthesize};
use safetensors::Dtype;
use serde_json::Value;
use tempfile::TempDir;

/// Llama 3.2's kind of base, small, and with rows that are no multiple of a generator's stream.
fn tiny() -> DecoderConfig {
    DecoderConfig {
        vocab_size: 1031,
        hidden_size: 96,
        intermediate_size: 200,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 24,
        ..Shape::named("llama-3.2-1b").unwrap().config.clone()
    }
}

fn made(config: &DecoderConfig, out: &Path, seed: u64) -> Base {
    synthesize(config, out, seed, None, |_, _| {}).unwrap();
    Base::open(out).unwrap()
}

fn numbers(base: &Base, name: &str) -> Vec<f64> {
    base.read(name).unwrap().to_f32().into_iter().map(f64::from).collect()
}

#[test]
fn it_opens_as_the_shape_that_was_asked_for() {
    let dir = TempDir::new().unwrap();
    for tied in [true, false] {
        let config = DecoderConfig { tie_word_embeddings: tied, ..tiny() };
        let base = made(&config, &dir.path().join(tied.to_string()), 0);
        assert_eq!(base.config, config);
        assert_eq!(base.shapes(), config.tensors().into_iter().collect());
        assert!(base.shapes().keys().all(|name| base.read(name).unwrap().dtype == Dtype::BF16));
    }
    let out = dir.path().join("true");
    let mut files: Vec<_> = fs::read_dir(&out).unwrap().map(|e| e.unwrap().file_name()).collect();
    files.sort();
    assert_eq!(files, ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]);
    let json: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
    assert_eq!((&json["torch_dtype"], &json["eos_token_id"]), (&"bfloat16".into(), &2.into()));
}

#[test]
fn every_family_opens_as_its_shape_was_asked_for() {
    let dir = TempDir::new().unwrap();
    for name in ["mistral-7b", "qwen2.5-7b", "qwen3-8b", "gemma-2-9b", "gemma-3-4b", "phi-3-mini"] {
        let config = DecoderConfig {
            vocab_size: 300,
            hidden_size: 32,
            intermediate_size: 48,
            num_hidden_layers: 13,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 8,
            ..Shape::named(name).unwrap().config.clone()
        };
        let base = made(&config, &dir.path().join(name), 0);
        assert_eq!(base.config, config);
        assert_eq!(base.shapes(), config.tensors().into_iter().collect());
        // Gemma stores its norms less one.
        let one = if name.starts_with("gemma") { 0.0 } else { 1.0 };
        assert!(numbers(&base, "model.norm.weight").iter().all(|x| (x - one).abs() < f64::EPSILON), "{name}");
    }
}

#[test]
fn weights_are_normal_and_norms_are_ones() {
    let dir = TempDir::new().unwrap();
    let base = made(&tiny(), &dir.path().join("base"), 5);
    for name in base.shapes().keys() {
        let x = numbers(&base, name);
        if name.ends_with("norm.weight") {
            assert_eq!(x, vec![1.0; x.len()], "{name}");
            continue;
        }
        let n = x.len() as f64;
        let moment = |power: i32| x.iter().map(|x| (x / 0.02).powi(power)).sum::<f64>() / n;
        // Each within five standard errors, which are sqrt(1/n), sqrt(2/n) and sqrt(96/n).
        assert!(moment(1).abs() < 5.0 * (1.0 / n).sqrt(), "{name}: mean {}", moment(1));
        assert!((moment(2) - 1.0).abs() < 5.0 * (2.0 / n).sqrt(), "{name}: variance {}", moment(2));
        assert!((moment(4) - 3.0).abs() < 5.0 * (96.0 / n).sqrt(), "{name}: kurtosis {}", moment(4));
    }
    // Neither two tensors nor two streams of one tensor are the same, nor go together.
    let x = numbers(&base, "model.embed_tokens.weight");
    let (first, second) = (&x[..1 << 15], &x[1 << 16..][..1 << 15]);
    let together: f64 = first.iter().zip(second).map(|(a, b)| a * b).sum::<f64>() / 0.0004;
    assert!(together.abs() < 5.0 * f64::from(1 << 15).sqrt(), "{together}");
    let [a, b] = [0, 1].map(|i| numbers(&base, &format!("model.layers.{i}.mlp.up_proj.weight")));
    assert_ne!(a, b);
}

#[test]
fn a_seed_always_makes_the_same_weights_and_another_makes_others() {
    let dir = TempDir::new().unwrap();
    let bytes = |name: &str| fs::read(dir.path().join(name).join("model.safetensors")).unwrap();
    for (name, seed) in [("a", 7), ("b", 7), ("c", 8)] {
        made(&tiny(), &dir.path().join(name), seed);
    }
    assert!(bytes("a") == bytes("b"));
    assert!(bytes("a") != bytes("c"));
    // What a tensor is depends on no other one.
    let deeper = DecoderConfig { num_hidden_layers: 3, tie_word_embeddings: false, ..tiny() };
    let (base, deeper) =
        (Base::open(&dir.path().join("a")).unwrap(), made(&deeper, &dir.path().join("d"), 7));
    for name in base.shapes().keys() {
        assert_eq!(base.read(name).unwrap().bytes, deeper.read(name).unwrap().bytes, "{name}");
    }
    // Nor on the version of anything: these are what they were when this was written.
    let first = &numbers(&base, "model.embed_tokens.weight")[..4];
    assert_eq!(first, EMBEDDED, "the first embeddings of seed 7");
}

const EMBEDDED: [f64; 4] =
    [0.014_648_437_5, -0.011_291_503_906_25, -0.001_731_872_558_593_75, 0.022_338_867_187_5];

/// The cache of the same base, but for the manifest that a cache has.
#[test]
fn straight_to_a_scheme_is_what_the_cache_would_hold() {
    let dir = TempDir::new().unwrap();
    let dense = made(&tiny(), &dir.path().join("dense"), 7);
    for scheme in Scheme::ALL {
        let out = dir.path().join(scheme.to_string());
        let written = synthesize(&tiny(), &out, 7, Some(scheme), |_, _| {}).unwrap();
        let straight = Base::open(&out).unwrap();
        assert_eq!(straight.quantization(), Some(scheme.to_string()));
        assert_eq!((&straight.config, straight.shapes()), (&dense.config, dense.shapes()));
        let cache = dir.path().join("cache");
        let cached = quantized(&dense, scheme, &cache, |_, _| ControlFlow::Continue(())).unwrap().base;
        let files = |dir: &Path| {
            let mut files: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
            files.retain(|name| name != "pronk_cache.json");
            files.sort();
            files
        };
        assert_eq!(files(&out), files(&cached.path));
        assert!(files(&out).len() > written.files.len());
        for file in files(&out) {
            assert!(
                fs::read(out.join(&file)).unwrap() == fs::read(cached.path.join(&file)).unwrap(),
                "{file:?}"
            );
        }
    }
}

#[test]
fn a_shape_without_room_for_the_tokenizer_is_refused() {
    let dir = TempDir::new().unwrap();
    let config = DecoderConfig { vocab_size: 258, num_key_value_heads: 3, ..tiny() };
    let refused = synthesize(&config, &dir.path().join("base"), 0, None, |_, _| {});
    let told = refused.unwrap_err().to_string();
    assert!(told.contains("vocab_size: expected at least 259") && told.contains("multiple of"), "{told}");
}
