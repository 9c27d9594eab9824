//! What a merge writes: its numbers, its formats, its files.
#![allow(clippy::unwrap_used)] // a test reports by panicking

mod tiny;

use std::fs;
use std::path::Path;

use pronk_export::{Dtype, MergeOptions};
use pronk_lora::{Adapter, ForwardMode};
use pronk_model::{Base, Decoder, LoadConfig};
use safetensors::SafeTensors;
use serde_json::json;
use tempfile::TempDir;
use tiny::{base, copy, device, golden, json, listing, options, peft, plain, random, tensors};

const FAMILIES: [&str; 6] = ["mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"];

/// A golden's float32 numbers and its token ids.
fn answers(name: &str) -> (Vec<u32>, Vec<f32>) {
    let kind = if FAMILIES.contains(&name) { "family" } else { "lora" };
    let bytes = fs::read(golden(&format!("{kind}-gradients.safetensors"))).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let numbers = |key: &str| file.tensor(&format!("{name}.{key}")).unwrap().data().to_vec();
    let first = i64::from_le_bytes(numbers("document_lengths")[..8].try_into().unwrap()) as usize;
    let ids = numbers("token_ids")
        .chunks_exact(8)
        .map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32)
        .collect();
    let logits =
        numbers("logits").chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let ids: Vec<u32> = ids;
    (ids[..first].to_vec(), logits)
}

/// The largest difference between a merged model's logits and `expected`, over the largest of those.
fn relative_difference(merged: &Path, token_ids: &[u32], expected: &[f32]) -> f32 {
    let decoder =
        Decoder::load(&Base::open(merged).unwrap(), &device(), LoadConfig::default(), |_, _| {}).unwrap();
    let found = decoder.logits(token_ids, ForwardMode::inference(None)).try_to_vec_as::<f32>().unwrap();
    assert_eq!(found.len(), expected.len());
    let difference = found.iter().zip(expected).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    difference / expected.iter().map(|x| x.abs()).fold(0.0, f32::max)
}

#[test]
fn merged_in_float32_a_model_answers_as_peft_does() {
    let llamas = [("gqa", "gqa"), ("rslora", "gqa"), ("tied", "tied"), ("patterns", "gqa"), ("dora", "bias")];
    for (adapter, variant) in llamas.into_iter().chain(FAMILIES.map(|name| (name, name))) {
        let (dir, base) = (TempDir::new().unwrap(), base(variant));
        let out = dir.path().join("merged");
        let (token_ids, expected) = answers(adapter);
        let options = MergeOptions { dtype: Some(Dtype::F32), prompt: token_ids.clone(), ..options() };
        let report = plain(&base, &peft(adapter, &base), &out, &options).unwrap();
        let difference = relative_difference(&out, &token_ids, &expected);
        assert!(difference < 1e-4, "adapter-{adapter}: {difference}");
        let found = report.verification;
        assert!(found.kl < 1e-9 && found.max_abs_difference < 1e-4 * found.max_logit, "{found:?}");
        assert_eq!(listing(dir.path()), ["merged"], "the staging directory is gone");
    }
}

/// The split names of a packed layer: in the base's own blocks, as PEFT loads them, and merged.
#[test]
fn parts_of_packed_layers_are_adapted_saved_and_merged() {
    let (dir, base) = (TempDir::new().unwrap(), base("phi3"));
    let (token_ids, _) = answers("phi3");
    let logits = |base: &Base, adapter: Option<&Adapter>| {
        let decoder = Decoder::load(base, &device(), LoadConfig::default(), |_, _| {}).unwrap();
        decoder.logits(&token_ids, ForwardMode::inference(adapter)).try_to_vec_as::<f32>().unwrap()
    };
    let alone = logits(&base, None);
    for (i, targets) in
        [&["q_proj", "v_proj", "up_proj", "o_proj"][..], &["k_proj"], &["gate_proj"]].iter().enumerate()
    {
        let adapter = random(&base, targets, 0.2);
        let expected = logits(&base, Some(&adapter));
        let (saved, out) = (dir.path().join(format!("adapter-{i}")), dir.path().join(format!("merged-{i}")));

        let modules = base.config.linear_modules();
        adapter.onto_packed(&base.config.adapter_modules()).save(&saved, "phi3", false).unwrap();
        let packed = Adapter::load(&saved, &modules, &device()).unwrap();
        assert!(packed.pairs.keys().all(|name| modules.iter().any(|m| m.name == *name)));
        assert_close("packed", &logits(&base, Some(&packed)), &expected);

        let options = MergeOptions { dtype: Some(Dtype::F32), prompt: token_ids.clone(), ..options() };
        plain(&base, &adapter, &out, &options).unwrap();
        assert_close("merged", &logits(&Base::open(&out).unwrap(), None), &expected);
        let moved = alone.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(moved > 0.1, "{targets:?} change nothing");
    }
}

fn assert_close(what: &str, found: &[f32], expected: &[f32]) {
    let difference = found.iter().zip(expected).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    let largest = expected.iter().map(|x| x.abs()).fold(0.0, f32::max);
    assert!(
        found.len() == expected.len() && difference < 1e-5 * largest,
        "{what}: {difference} of {largest}"
    );
}

#[test]
fn what_the_adapter_does_not_touch_keeps_its_bytes() {
    let (dir, base) = (TempDir::new().unwrap(), base("gqa"));
    let (out, adapter) = (dir.path().join("merged"), peft("rslora", &base));
    let mut heard = Vec::new();
    let report = pronk_export::merge(
        &base,
        &adapter,
        &out,
        &options(),
        &device(),
        &mut |done, total| heard.push((done, total)),
        &mut |_| Ok(()),
    )
    .unwrap();
    let (before, after) =
        (tensors(&golden("tiny-gqa/model.safetensors")), tensors(&out.join("model.safetensors")));
    assert!(before.keys().eq(after.keys()));
    for (name, (dtype, shape, bytes)) in &after {
        let adapted = name.strip_suffix(".weight").is_some_and(|m| adapter.pairs.contains_key(m));
        assert_eq!((dtype, shape), (&before[name].0, &before[name].1), "{name}");
        assert_eq!(bytes != &before[name].2, adapted, "{name}");
    }
    assert_eq!((report.tensors, report.adapted), (before.len(), 4));
    assert_eq!(report.files, ["model.safetensors"]);
    assert!(heard.into_iter().eq((0..=before.len()).map(|done| (done, before.len()))));
    for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        assert_eq!(fs::read(out.join(file)).unwrap(), fs::read(base.path.join(file)).unwrap(), "{file}");
    }
}

#[test]
fn a_tied_bfloat16_base_stays_tied_and_bfloat16() {
    let (dir, base) = (TempDir::new().unwrap(), base("tied"));
    let out = dir.path().join("merged");
    let report = plain(&base, &peft("tied", &base), &out, &options()).unwrap();
    let merged = tensors(&out.join("model.safetensors"));
    assert!(merged.values().all(|t| t.0 == safetensors::Dtype::BF16));
    assert!(!merged.contains_key("lm_head.weight"));
    assert_eq!(json(&out.join("config.json"))["torch_dtype"], "bfloat16");
    assert!(report.verification.kl > 0.0, "{report:?}");
    let raw = fs::read(out.join("model.safetensors")).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&raw).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
}

#[test]
fn shards_keep_their_names_and_get_an_index() {
    let (dir, base) = (TempDir::new().unwrap(), base("head-dim"));
    let adapter = random(&base, &["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"], 0.2);
    for (name, dtype, times) in [("kept", None, 1), ("wider", Some(Dtype::F32), 2)] {
        let out = dir.path().join(name);
        let report = plain(&base, &adapter, &out, &MergeOptions { dtype, ..options() }).unwrap();
        let (before, after) = (
            json(&base.path.join("model.safetensors.index.json")),
            json(&out.join("model.safetensors.index.json")),
        );
        assert_eq!(before["weight_map"], after["weight_map"]);
        let total = before["metadata"]["total_size"].as_u64().unwrap() * times;
        assert_eq!((after["metadata"]["total_size"].as_u64().unwrap(), report.bytes), (total, total));
        assert_eq!(report.files.len(), 2);
        for file in &report.files {
            assert!(tensors(&base.path.join(file)).keys().eq(tensors(&out.join(file)).keys()), "{file}");
        }
    }
    let config = json(&dir.path().join("wider/config.json"));
    assert_eq!((&config["dtype"], &config["torch_dtype"]), (&json!("float32"), &json!("float32")));
}

#[test]
fn every_kind_of_base_can_be_merged_into_every_format() {
    let dir = TempDir::new().unwrap();
    for variant in ["gqa", "tied", "bias", "head-dim", "rope-linear", "rope-llama3"] {
        let base = base(variant);
        let adapter = random(&base, &["q_proj", "up_proj"], 0.2);
        for dtype in Dtype::ALL {
            let out = dir.path().join(format!("{variant}-{dtype}"));
            let report = plain(&base, &adapter, &out, &MergeOptions { dtype: Some(dtype), ..options() });
            println!("{variant} {dtype}: {:?}", report.unwrap().verification);
        }
    }
}

#[test]
fn a_configuration_gets_the_names_of_old_and_new_readers() {
    let dir = TempDir::new().unwrap();
    let (old, new) = (&["rope_parameters", "dtype"], &["rope_scaling", "rope_theta", "torch_dtype"]);
    for (name, removed) in [("old", &old[..]), ("new", &new[..])] {
        let path = dir.path().join(name);
        copy("rope-linear", &path);
        let whole = json(&path.join("config.json"));
        let mut config = whole.clone();
        config["a_key_of_its_own"] = json!([1, 1e-5]);
        for key in removed {
            config.as_object_mut().unwrap().remove(*key);
        }
        fs::write(path.join("config.json"), config.to_string()).unwrap();
        let (base, out) = (Base::open(&path).unwrap(), dir.path().join(format!("{name}-merged")));
        plain(&base, &random(&base, &["q_proj"], 0.1), &out, &options()).unwrap();
        let mut merged = json(&out.join("config.json"));
        let own = merged.as_object_mut().unwrap().remove("a_key_of_its_own");
        assert_eq!(own, Some(json!([1, 1e-5])));
        assert_eq!(merged, whole);
    }
}

#[test]
fn licences_go_along_and_other_files_do_not() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("base");
    copy("tied", &path);
    for file in ["LICENSE.txt", "NOTICE", "chat_template.jinja", "README.md", "pytorch_model.bin"] {
        fs::write(path.join(file), file).unwrap();
    }
    let (base, out) = (Base::open(&path).unwrap(), dir.path().join("merged"));
    plain(&base, &peft("tied", &base), &out, &options()).unwrap();
    let expected = [
        "LICENSE.txt",
        "NOTICE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(listing(&out), expected);
}
