//! Adapters for other runtimes: their numbers, their files, and what is refused.
#![allow(clippy::unwrap_used)] // a test reports by panicking

mod tiny;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use burn::tensor::{Tensor, TensorData};
use pronk_export::{ExportError, ExportOptions, ExportReport, Runtime, export};
use pronk_lora::{Adapter, LoraConfig, TargetModules};
use pronk_model::{Base, GgufAdapter};
use serde_json::json;
use tempfile::TempDir;
use tiny::{PROMPT, base, device, golden, json, listing, peft, random, tensors};

const FAMILIES: [&str; 6] = ["mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"];

fn exported(
    base: &Base,
    adapter: &Adapter,
    runtime: Runtime,
    out: &Path,
) -> Result<ExportReport, ExportError> {
    let prompt: Vec<u32> = PROMPT.iter().map(|id| id % base.config.vocab_size as u32).collect();
    let options = ExportOptions { runtime, base_name: "org/base".into(), prompt };
    export(base, adapter, out, &options, &device(), &mut |_| Ok(()))
}

#[test]
fn every_runtime_gets_an_adapter_of_every_family() {
    let dir = TempDir::new().unwrap();
    let llamas = [("gqa", "gqa"), ("rslora", "gqa"), ("patterns", "gqa"), ("tied", "tied"), ("dora", "bias")];
    for (adapter, variant) in llamas.into_iter().chain(FAMILIES.map(|name| (name, name))) {
        let base = base(variant);
        let adapter_of = peft(adapter, &base);
        for runtime in Runtime::ALL {
            let knows_dora = [Runtime::Peft, Runtime::Mlx].contains(&runtime);
            if (adapter, runtime) == ("gemma3", Runtime::MistralRs) || adapter == "dora" && !knows_dora {
                continue; // refused, see below
            }
            let out = dir.path().join(format!("{adapter}-{runtime}"));
            let report = exported(&base, &adapter_of, runtime, &out).unwrap();
            assert_eq!(report.adapted, adapter_of.pairs.len());
            assert!(report.verification.kl < 1e-9, "{adapter} {runtime}: {report:?}");
            let files: BTreeSet<String> = report.files.iter().map(|&name| name.to_owned()).collect();
            assert!(files.into_iter().eq(listing(&out)), "{runtime}");
        }
    }
}

#[test]
fn llama_cpp_gets_a_scale_that_it_can_express() {
    let (dir, base) = (TempDir::new().unwrap(), base("gqa"));
    // alpha 8 of rank 4; alpha 8 of rank 8 with rsLoRA, which no alpha / rank of whole numbers is
    for (name, alpha, b_times) in [("gqa", 8.0, 1.0), ("rslora", 0.0, 8.0 / 8_f32.sqrt())] {
        let (out, adapter) = (dir.path().join(name), peft(name, &base));
        exported(&base, &adapter, Runtime::Ollama, &out).unwrap();
        let found = GgufAdapter::open(&out.join("adapter.gguf"), &base.config).unwrap();
        assert!((found.alpha - alpha).abs() < 1e-12, "{name}: {}", found.alpha);
        assert!(found.pairs.keys().eq(adapter.pairs.keys()));
        for (module, pair) in &found.pairs {
            let ours = &adapter.pairs[module];
            let values = |tensor: &Tensor<2>| tensor.try_to_vec_as::<f32>().unwrap();
            assert_eq!(pair.a, values(&ours.a), "{module}");
            let b = values(&ours.b).into_iter().map(|x| x * b_times);
            assert!(pair.b.iter().zip(b).all(|(x, y)| (x - y).abs() <= 1e-6 * y.abs()), "{module}");
        }
    }
}

/// In the file the halves of each head alternate, for q and k alone, and in B alone.
#[test]
fn rows_of_queries_and_keys_alternate_in_the_file() {
    let (dir, base) = (TempDir::new().unwrap(), base("gqa"));
    let adapter = random(&base, &["q_proj", "v_proj"], 0.2);
    exported(&base, &adapter, Runtime::Gguf, &dir.path().join("out")).unwrap();
    let bytes = fs::read(dir.path().join("out/adapter.gguf")).unwrap();
    for (module, permuted) in [("q_proj", true), ("v_proj", false)] {
        let pair = &adapter.pairs[&format!("model.layers.1.self_attn.{module}")];
        let b = pair.b.try_to_vec_as::<f32>().unwrap();
        let (rank, head_dim) = (4, base.config.head_dim);
        // rows 0, head_dim / 2, 1 of the first head are the file's rows 0, 1, 2
        let order = if permuted { [0, head_dim / 2, 1] } else { [0, 1, 2] };
        let begin = order.iter().flat_map(|row| &b[row * rank..][..rank]).flat_map(|x| x.to_le_bytes());
        let begin: Vec<u8> = begin.collect();
        assert!(bytes.windows(begin.len()).any(|window| window == begin), "{module}");
    }
}

#[test]
fn mlx_gets_transposed_factors_and_one_scale() {
    let (dir, base) = (TempDir::new().unwrap(), base("gqa"));
    let (out, adapter) = (dir.path().join("mlx"), peft("rslora", &base));
    exported(&base, &adapter, Runtime::Mlx, &out).unwrap();
    let config = json(&out.join("adapter_config.json"));
    assert_eq!(config["fine_tune_type"], "lora");
    assert_eq!(config["num_layers"], 2);
    let parameters = &config["lora_parameters"];
    assert_eq!(
        (&parameters["rank"], &parameters["keys"]),
        (&json!(8), &json!(["self_attn.q_proj", "self_attn.v_proj"]))
    );
    assert!((parameters["scale"].as_f64().unwrap() - 8.0 / 8_f64.sqrt()).abs() < 1e-12);
    let file = tensors(&out.join("adapters.safetensors"));
    let (_, shape, bytes) = &file["model.layers.0.self_attn.v_proj.lora_b"];
    assert_eq!(shape, &[8, 16]);
    let b = adapter.pairs["model.layers.0.self_attn.v_proj"].b.clone().transpose();
    let b: Vec<u8> = b.try_to_vec_as::<f32>().unwrap().into_iter().flat_map(f32::to_le_bytes).collect();
    assert_eq!(bytes, &b);
}

#[test]
fn peft_directories_name_their_base() {
    let (dir, base) = (TempDir::new().unwrap(), base("tied"));
    exported(&base, &peft("tied", &base), Runtime::Vllm, &dir.path().join("out")).unwrap();
    let config = json(&dir.path().join("out/adapter_config.json"));
    assert_eq!(config["base_model_name_or_path"], "org/base");
}

fn of_rank(base: &Base, rank: usize) -> Adapter {
    let target_modules = TargetModules::Names(vec!["q_proj".into()]);
    let config = LoraConfig { rank, target_modules, ..LoraConfig::default() };
    let mut adapter = Adapter::init(&config, &base.config.adapter_modules(), 1, &device()).unwrap();
    for pair in adapter.pairs.values_mut() {
        pair.b = Tensor::ones_like(&pair.b) * 1e-3;
    }
    adapter
}

#[test]
fn what_a_runtime_cannot_load_is_refused_with_the_reason() {
    let dir = TempDir::new().unwrap();
    let refusal = |base: &Base, adapter: &Adapter, runtime| {
        let error = exported(base, adapter, runtime, &dir.path().join("new/out")).unwrap_err().to_string();
        assert_eq!(listing(dir.path()), Vec::<String>::new(), "something is left behind");
        error
    };
    let gguf = Base::open(&golden("mistral.gguf")).unwrap();
    let words = refusal(&gguf, &peft("mistral", &gguf), Runtime::MistralRs);
    assert!(words.contains("mistralrs cannot") && words.contains("merge"), "{words}");
    let bias = base("bias");
    for runtime in [Runtime::Gguf, Runtime::Ollama, Runtime::Vllm, Runtime::MistralRs] {
        let words = refusal(&bias, &peft("dora", &bias), runtime);
        assert!(words.contains("DoRA") && words.contains("merge"), "{words}");
    }
    let gemma3 = base("gemma3");
    let words = refusal(&gemma3, &peft("gemma3", &gemma3), Runtime::MistralRs);
    assert!(words.contains("Gemma 3"), "{words}");
    let base = base("gqa");
    let words = refusal(&base, &of_rank(&base, 513), Runtime::Vllm);
    assert!(words.contains("rank 513") && words.contains("512"), "{words}");

    let mut nothing = random(&base, &["q_proj"], 0.0);
    for runtime in [Runtime::Gguf, Runtime::Mlx, Runtime::Peft] {
        let words = refusal(&base, &nothing, runtime);
        assert!(words.contains("zero"), "{words}");
    }
    for pair in nothing.pairs.values_mut() {
        let [rows, rank] = pair.b.dims();
        let mut values = vec![0.0; rows * rank];
        values[3] = f32::NAN;
        pair.b = Tensor::from_data(TensorData::new(values, [rows, rank]), &device());
    }
    let words = refusal(&base, &nothing, Runtime::Mlx);
    assert!(words.contains("NaN") && words.contains("q_proj"), "{words}");
    let words = refusal(&tiny::base("head-dim"), &peft("gqa", &base), Runtime::Gguf);
    assert!(words.contains("does not fit the base"), "{words}");
}

#[test]
fn what_its_user_has_to_know_is_said() {
    let (dir, base) = (TempDir::new().unwrap(), base("gqa"));
    let notes = |rank, runtime: Runtime| {
        let out = dir.path().join(format!("{runtime}-{rank}"));
        exported(&base, &of_rank(&base, rank), runtime, &out).unwrap().notes.join("\n")
    };
    assert_eq!(notes(16, Runtime::Vllm), "");
    assert!(notes(20, Runtime::Vllm).contains("--max-lora-rank 32"));
    assert_eq!(notes(20, Runtime::Peft), "");
    let gguf = Base::open(&golden("mistral.gguf")).unwrap();
    let report = exported(&gguf, &peft("mistral", &gguf), Runtime::Mlx, &dir.path().join("mlx")).unwrap();
    assert!(report.notes.concat().contains("mlx wants the Hugging Face directory"), "{:?}", report.notes);
}

#[test]
fn a_damaged_gguf_adapter_is_an_error() {
    let (dir, base) = (TempDir::new().unwrap(), base("gqa"));
    exported(&base, &peft("gqa", &base), Runtime::Gguf, &dir.path().join("out")).unwrap();
    let whole = fs::read(dir.path().join("out/adapter.gguf")).unwrap();
    let path = dir.path().join("damaged.gguf");
    let opened = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        GgufAdapter::open(&path, &base.config).map(|_| ()).map_err(|e| e.to_string())
    };
    assert_eq!(opened(&whole), Ok(()));
    for length in [0, 4, 30, 200, whole.len() / 2, whole.len() - 40] {
        let error = opened(&whole[..length]).unwrap_err();
        assert!(error.contains("damaged.gguf"), "{error}");
    }
    let place = |of: &str| whole.windows(of.len()).position(|window| window == of.as_bytes()).unwrap();
    let replaced = |at: usize, by: &[u8]| {
        let mut bytes = whole.clone();
        bytes[at..at + by.len()].copy_from_slice(by);
        opened(&bytes).unwrap_err()
    };
    assert!(replaced(place("adapter.type"), b"adapter.tipe").contains("adapter.type"));
    assert!(replaced(place("weight.lora_a"), b"weight.lora_c").contains("lora_c"));
    // Behind a tensor's name stand the number of its dimensions, in four bytes, and the dimensions. Found by fuzzing.
    let dimension = place("weight.lora_a") + "weight.lora_a".len() + 4;
    assert!(replaced(dimension, &[0; 8]).contains("expected numbers, found none"));
}
