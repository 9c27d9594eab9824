//! `pronk merge`, as its user runs it.
#![allow(clippy::unwrap_used, clippy::expect_used)] // in a test, a panic is the report

mod support;

use std::fs;

use safetensors::{Dtype, SafeTensors};
use support::{Run, Workshop, devices, golden};

fn merge(shop: &Workshop, base: &str, adapter: &str, out: &str, more: &[&str]) -> Run {
    let fixed = ["merge", "--base", base, "--adapter", adapter, "--out", out];
    shop.pronk(fixed.iter().chain(more))
}

fn generate(shop: &Workshop, base: &str, more: &[&str]) -> String {
    let fixed = ["generate", "--base", base, "--instruction", "Say something.", "--max-new-tokens", "40"];
    shop.pronk(fixed.iter().chain(more)).succeeds().out
}

#[test]
fn a_merged_model_answers_as_base_and_adapter_do() {
    for device in devices() {
        for (base, adapter) in [("tiny-gqa", "adapter-gqa"), ("tiny-gqa", "adapter-rslora")] {
            let shop = Workshop::new();
            let (base, adapter) = (golden(base), golden(adapter));
            let run = merge(&shop, &base, &adapter, "merged", &["--device", device]).succeeds();
            for word in ["against base + adapter", "differ by", "KL", "merged"] {
                assert!(run.out.contains(word), "{word}: {}", run.out);
            }
            let with_adapter = generate(&shop, &base, &["--adapter", &adapter, "--device", device]);
            assert_eq!(generate(&shop, "merged", &["--device", device]), with_adapter);
            assert_ne!(generate(&shop, &base, &["--device", device]), with_adapter);
        }
    }
}

/// It brings back what its base has lost: it answers over the quantized base, and is merged into that.
#[test]
fn an_adapter_of_a_quantized_base_is_merged_into_that() {
    let cases = devices().into_iter().flat_map(|device| {
        ["lora.init_lora_weights=loftq", "lora.restore_rank=4"].map(|restores| (device, restores))
    });
    for (device, restores) in cases {
        let shop = Workshop::new();
        shop.train("run", device, &["base.quantize=nf4", restores, "base.compute=f32"]).succeeds();
        let (base, adapter) = (golden("tiny-gqa"), "run/adapter");
        let said = shop.pronk(["adapter", "info", adapter]).succeeds();
        assert!(said.out.contains("tiny-gqa quantized to 4 bits"), "{}", said.out);
        assert!(shop.read("run/adapter/README.md").contains("quantized to NF4"));
        let to = ["--device", device, "--dtype", "f32"];
        let run = merge(&shop, &base, adapter, "merged", &to).succeeds();
        assert!(run.err.contains("belongs to") && !run.err.contains("warning"), "{}", run.err);
        let with_adapter = generate(&shop, &base, &["--adapter", adapter, "--device", device]);
        assert_eq!(generate(&shop, "merged", &["--device", device]), with_adapter);
        let refused = merge(&shop, &base, adapter, "other", &["--onto", &base]);
        refused.fails(&["--onto", "LoftQ", "leave --onto out"]);
    }
}

#[test]
fn names_and_companions_are_the_bases_and_the_template_the_adapters() {
    let shop = Workshop::new();
    let adapter = {
        shop.write("recipe.toml", support::recipe("tiny-head-dim"));
        shop.train("run", "cpu", &[]).succeeds();
        "run/adapter"
    };
    let run = merge(&shop, &golden("tiny-head-dim"), adapter, "deep/down/merged", &[]).succeeds();
    assert!(run.out.contains("2 file(s)"), "{}", run.out);
    let mut names: Vec<_> = fs::read_dir(shop.path("deep/down/merged"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    // And the template that the adapter was trained with, which is the merged model's from now on.
    let expected = [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names, expected);
    for shard in &expected[5..7] {
        let ours = shop.bytes(&format!("deep/down/merged/{shard}"));
        let theirs = fs::read(golden(&format!("tiny-head-dim/{shard}"))).unwrap();
        let (ours, theirs) =
            (SafeTensors::deserialize(&ours).unwrap(), SafeTensors::deserialize(&theirs).unwrap());
        let mut changed = 0;
        for (name, tensor) in theirs.tensors() {
            let merged = ours.tensor(&name).unwrap();
            assert_eq!((merged.dtype(), merged.shape()), (tensor.dtype(), tensor.shape()), "{name}");
            let adapted = name.contains("q_proj") || name.contains("v_proj");
            assert!(adapted || merged.data() == tensor.data(), "{name} has no adapter");
            changed += usize::from(merged.data() != tensor.data());
        }
        assert!(changed > 0 && ours.len() == theirs.len(), "{shard}");
    }
    let tokenizer = |dir: &str| fs::read(format!("{dir}/tokenizer.json")).unwrap();
    assert_eq!(shop.bytes("deep/down/merged/tokenizer.json"), tokenizer(&golden("tiny-head-dim")));
}

#[test]
fn formats_are_as_asked() {
    let shop = Workshop::new();
    let asked = [
        (None, Dtype::BF16, "bfloat16"),
        (Some("f32"), Dtype::F32, "float32"),
        (Some("f16"), Dtype::F16, "float16"),
        (Some("bf16"), Dtype::BF16, "bfloat16"),
    ];
    for (dtype, expected, name) in asked {
        let out = dtype.unwrap_or("own");
        let flag: Vec<&str> = dtype.into_iter().flat_map(|d| ["--dtype", d]).collect();
        merge(&shop, &golden("tiny-tied"), &golden("adapter-tied"), out, &flag).succeeds();
        let bytes = shop.bytes(&format!("{out}/model.safetensors"));
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert!(file.tensors().iter().all(|(_, tensor)| tensor.dtype() == expected), "{out}");
        let config: serde_json::Value =
            serde_json::from_str(&shop.read(&format!("{out}/config.json"))).unwrap();
        assert_eq!(config["torch_dtype"], name);
        generate(&shop, out, &[]);
    }
    assert_eq!(shop.bytes("own/model.safetensors"), shop.bytes("bf16/model.safetensors"));
    merge(&shop, &golden("tiny-tied"), &golden("adapter-tied"), "f8", &["--dtype", "f8"]).fails(&[
        "--dtype",
        "f8",
        "f32, f16, bf16",
    ]);
}

#[test]
fn what_is_there_is_not_written_over() {
    let shop = Workshop::new();
    let (base, adapter) = (golden("tiny-gqa"), golden("adapter-gqa"));
    merge(&shop, &base, &adapter, "merged", &[]).succeeds();
    let base_copy = shop.copy_base("tiny-gqa", "base");
    let before = shop.snapshot();
    merge(&shop, &base, &adapter, "merged", &[]).fails(&[
        "merged",
        "does not exist, or an empty directory",
        "found a directory with something in it",
    ]);
    merge(&shop, &base, &adapter, "data.json", &[]).fails(&["data.json", "found a file"]);
    merge(&shop, base_copy.to_str().unwrap(), &adapter, "base/merged", &[])
        .fails(&["base/merged", "lies in the base"]);
    assert_eq!(shop.snapshot(), before);

    fs::create_dir(shop.path("empty")).unwrap();
    merge(&shop, &base, &adapter, "empty", &[]).succeeds();
}

#[test]
fn an_adapter_of_another_base_is_refused() {
    let shop = Workshop::new();
    let before = shop.snapshot();
    merge(&shop, &golden("tiny-head-dim"), &golden("adapter-gqa"), "m", &[]).fails(&[
        "does not fit",
        "expected shape",
        "found",
    ]);
    merge(&shop, &golden("tiny-gqa"), "nowhere", "m", &[]).fails(&["nowhere", "adapter_config.json"]);
    assert_eq!(shop.snapshot(), before);
}

/// From a base of each kind; the tokenizer goes into the file, the template beside it, and Ollama is told both.
#[test]
fn a_merged_gguf_file_is_a_base_that_answers_the_same() {
    let shop = Workshop::new();
    for (base, adapter, out) in [
        (golden("tiny-gqa"), golden("adapter-gqa"), "one"),
        (golden("qwen2.gguf"), golden("adapter-qwen2"), "two"),
    ] {
        let run = merge(&shop, &base, &adapter, out, &["--format", "gguf", "--gguf-type", "f32"]).succeeds();
        assert!(run.out.contains("against base + adapter") && run.out.contains("1 file(s)"), "{}", run.out);
        let merged = format!("{out}/model.gguf");
        let instruction = if out == "one" { "Say something." } else { "SI" };
        let answer = |base: &str, more: &[&str]| {
            let fixed = ["generate", "--base", base, "--instruction", instruction, "--max-new-tokens", "24"];
            let template = shop.write("plain.jinja", "{{ instruction }}{{ input }} {{ output }}");
            let template = ["--template", template.to_str().unwrap()];
            shop.pronk(fixed.iter().chain(&template).chain(more)).succeeds().out
        };
        assert_eq!(answer(&merged, &[]), answer(&base, &["--adapter", &adapter]));
        let modelfile = shop.read(&format!("{out}/Modelfile"));
        assert!(modelfile.starts_with("FROM ./model.gguf\nTEMPLATE \"\"\""), "{modelfile}");
    }
    let run = merge(
        &shop,
        &golden("tiny-gqa"),
        &golden("adapter-gqa"),
        "x",
        &["--format", "gguf", "--gguf-type", "q3"],
    );
    run.fails(&["--gguf-type", "q8_0, q4_0 or q4_k"]);
    assert!(!shop.path("x").exists());
}

#[test]
fn a_quantized_base_is_merged_onto_its_original() {
    let shop = Workshop::new();
    shop.write("recipe.toml", support::recipe("tiny-gqa"));
    shop.train("run", "cpu", &["base.quantize=nf4"]).succeeds();
    let cache = fs::read_dir(shop.path(".quantized")).unwrap().next().unwrap().unwrap().path();
    let quantized = cache.to_str().unwrap();
    let warned = merge(&shop, quantized, "run/adapter", "plain", &[]).succeeds();
    assert!(warned.err.contains("warning") && warned.err.contains("--onto"), "{}", warned.err);
    let run = merge(&shop, quantized, "run/adapter", "onto", &["--onto", &golden("tiny-gqa")]).succeeds();
    assert!(run.out.contains("which was trained: KL") && !run.err.contains("warning"), "{run:?}");
    // Only what is adapted differs from the original.
    let (ours, theirs) =
        (shop.bytes("onto/model.safetensors"), fs::read(golden("tiny-gqa/model.safetensors")).unwrap());
    let (ours, theirs) =
        (SafeTensors::deserialize(&ours).unwrap(), SafeTensors::deserialize(&theirs).unwrap());
    for (name, tensor) in theirs.tensors() {
        let adapted = name.contains("q_proj") || name.contains("v_proj");
        assert_eq!(ours.tensor(&name).unwrap().data() != tensor.data(), adapted, "{name}");
    }
}
