//! `pronk export` as its users run it.
#![allow(clippy::unwrap_used)] // a test reports by panicking

mod support;

use support::{Run, Workshop, golden};

fn export(shop: &Workshop, base: &str, adapter: &str, to: &str, out: &str) -> Run {
    shop.pronk(["export", "--base", base, "--adapter", adapter, "--to", to, "--out", out])
}

#[test]
fn every_runtime_is_told_how_to_load_it() {
    let shop = Workshop::new();
    for (to, command) in [
        ("peft", "PeftModel.from_pretrained"),
        ("gguf", "llama-cli --model BASE.gguf --lora out-gguf/adapter.gguf"),
        ("mlx", "mlx_lm.generate --model"),
        ("ollama", "ollama create NAME --file out-ollama/Modelfile"),
        ("vllm", "--enable-lora --lora-modules NAME=out-vllm"),
        ("mistralrs", "mistralrs.LoraAdapter(\"NAME\", \"out-mistralrs\")"),
    ] {
        let run =
            export(&shop, &golden("tiny-gqa"), &golden("adapter-gqa"), to, &format!("out-{to}")).succeeds();
        for word in ["exported 14 modules", "against base + adapter", "KL", command] {
            assert!(run.out.contains(word), "{word}: {}", run.out);
        }
    }
    let names = |dir: &str| {
        let mut names: Vec<_> = std::fs::read_dir(shop.path(dir))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names("out-ollama"), ["Modelfile", "README.md", "adapter.gguf", "manifest.json"]);
    assert_eq!(
        names("out-mlx"),
        ["README.md", "adapter_config.json", "adapters.safetensors", "manifest.json"]
    );
    shop.pronk(["verify", "out-mlx"]).succeeds();
}

#[test]
fn the_modelfile_asks_as_training_did() {
    let shop = Workshop::new();
    shop.train("run", "cpu", &[]).succeeds();
    export(&shop, &golden("tiny-gqa"), "run/adapter", "ollama", "out").succeeds();
    let modelfile = shop.read("out/Modelfile");
    let from = format!("FROM {}\n", golden("tiny-gqa"));
    assert!(modelfile.starts_with(&from) && modelfile.contains("\nADAPTER ./adapter.gguf\n"), "{modelfile}");
    assert!(modelfile.ends_with("\nPARAMETER stop \"</s>\"\n"), "{modelfile}");
    // alpaca-short, which the recipe trains with; `<s>` is the runtime's to add
    assert!(modelfile.contains("{{ else }}### Instruction:\n{{ end }}{{ range"), "{modelfile}");
    assert!(modelfile.contains("{{ .Content }}\n\n### Response:\n{{ else"), "{modelfile}");
    assert_eq!(shop.bytes("out/chat_template.jinja"), shop.bytes("run/adapter/chat_template.jinja"));
}

#[test]
fn what_cannot_be_exported_leaves_nothing_behind() {
    let shop = Workshop::new();
    let before = shop.snapshot();
    let (base, adapter) = (golden("tiny-gqa"), golden("adapter-gqa"));
    export(&shop, &base, &adapter, "tensorrt", "out")
        .fails(&["--to", "peft, gguf, mlx, ollama, vllm or mistralrs"]);
    export(&shop, &golden("mistral.gguf"), &golden("adapter-mistral"), "mistralrs", "out")
        .fails(&["mistralrs cannot load this adapter", "merge"]);
    export(&shop, &golden("tiny-head-dim"), &adapter, "gguf", "out").fails(&["does not fit"]);
    export(&shop, &base, "nowhere", "gguf", "out").fails(&["nowhere", "adapter_config.json"]);
    export(&shop, &base, &adapter, "gguf", "data.json").fails(&["data.json", "found a file"]);
    assert_eq!(shop.snapshot(), before);
}
