//! What is trained whole: embeddings and head, biases, and tokens that are added; as their user runs them.
#![allow(clippy::unwrap_used, clippy::expect_used)] // in a test, a panic is the report

mod support;

use std::fs;

use safetensors::SafeTensors;
use support::{Run, Workshop, devices, golden, recipe, tensor};

const BOTH: &str = "lora.modules_to_save=['embed_tokens','lm_head']";
const TOKENS: &str = "tokens.add=['<|a|>','<|b|>','<|c|>','<|d|>','<|e|>','<|f|>']";
const EMBEDDINGS: &str = "base_model.model.model.embed_tokens.weight";
const HEAD: &str = "base_model.model.lm_head.weight";

fn workshop(base: &str) -> Workshop {
    let shop = Workshop::new();
    shop.write("recipe.toml", recipe(base));
    shop
}

fn generate(shop: &Workshop, base: &str, more: &[&str]) -> String {
    let fixed = ["generate", "--base", base, "--instruction", "Say <|a|>.", "--max-new-tokens", "24"];
    shop.pronk(fixed.iter().chain(more)).succeeds().out
}

fn info(shop: &Workshop, adapter: &str) -> String {
    shop.pronk(["adapter", "info", adapter]).succeeds().out
}

/// Of every kind at once, by every optimizer: the state that the run goes on from is all of it.
#[test]
fn a_run_that_goes_on_is_the_run_that_was_never_stopped() {
    let bases = [("tiny-gqa", "lora.bias=none"), ("tiny-bias", "lora.bias=all")];
    for device in devices() {
        for (base, bias) in bases {
            for optimizer in ["adamw", "adamw8bit", "lion", "muon"] {
                let shop = workshop(base);
                let optimizer = format!("train.optimizer={optimizer}");
                let set = [TOKENS, BOTH, bias, &optimizer, "train.weight_decay=0.01"];
                shop.train("whole", device, &set).succeeds();
                shop.train("stopped", device, &set).succeeds();
                fs::remove_dir_all(shop.path("stopped/checkpoints/step-000008")).unwrap();
                fs::remove_dir_all(shop.path("stopped/adapter")).unwrap();
                shop.resume("stopped", device, &[]).succeeds();
                assert_eq!(shop.timeless_metrics("stopped"), shop.timeless_metrics("whole"), "{optimizer}");
                for file in ["optimizer.safetensors", "adapter_model.safetensors"] {
                    let newest = |run| shop.bytes(&format!("{run}/checkpoints/step-000008/{file}"));
                    assert!(newest("stopped") == newest("whole"), "{base}, {optimizer}, {device}: {file}");
                }
            }
        }
    }
}

#[test]
fn copies_of_one_weight_part_or_stay_one() {
    let shop = workshop("tiny-tied");
    for (run, set) in [
        ("one", [BOTH, "lora.ensure_weight_tying=true"]),
        ("parted", [BOTH, "lora.ensure_weight_tying=false"]),
        ("named-once", ["lora.modules_to_save=['lm_head']", "lora.ensure_weight_tying=true"]),
    ] {
        shop.train(run, "cpu", &set).succeeds();
        shop.resume(run, "cpu", &[]).succeeds();
        let file = shop.adapter(run);
        let same = tensor(&file, EMBEDDINGS).0 == tensor(&file, HEAD).0;
        assert_eq!(same, run != "parted", "{run}");
        let config = shop.read(&format!("{run}/adapter/adapter_config.json"));
        assert_eq!(config.contains("\"ensure_weight_tying\": true"), same, "{run}");
    }
    assert_eq!(shop.adapter("one"), shop.adapter("named-once"));
    assert!(info(&shop, "one/adapter").contains("264 tokens of 32, the head's too (ensure_weight_tying)"));
    assert!(info(&shop, "parted/adapter").contains("trained whole: lm_head.weight, 264 tokens of 32\n"));
}

#[test]
fn memory_changes_and_nothing_else() {
    for device in devices() {
        let shop = Workshop::new();
        let ways: [(&str, &[&str]); 4] = [
            ("resident", &["base.quantize=nf4"]),
            ("streamed", &["base.quantize=nf4", "base.weights=streamed"]),
            ("blocks", &["base.quantize=nf4", "train.recompute=blocks"]),
            ("none", &["base.quantize=nf4", "train.recompute=none"]),
        ];
        shop.trains_alike(device, &ways, &[BOTH, TOKENS]);
        let (rows, shape) = tensor(&shop.adapter("resident"), HEAD);
        assert!(shape == [266, 32] && rows.iter().all(|x| x.is_finite()));
    }
}

#[test]
fn a_plan_counts_what_is_trained_whole() {
    let shop = Workshop::new();
    let plan = |set: &[&str]| {
        let set = set.iter().flat_map(|&change| ["--set", change]);
        shop.pronk(["plan", "recipe.toml"].into_iter().chain(set)).succeeds().out
    };
    assert!(!plan(&[]).contains("the optimizer's step"));
    let whole = plan(&[BOTH, TOKENS]);
    assert!(whole.contains("or: the optimizer's step"), "{whole}");
    assert!(whole.contains("<|a|> is 260, <|b|> is 261") && whole.contains("trained whole"), "{whole}");
}

#[test]
fn added_tokens_are_in_the_adapters_folder_and_in_every_merged_model() {
    for (base, gguf) in [("tiny-gqa", false), ("tiny-tied", false), ("mistral.gguf", true)] {
        let shop = workshop(base);
        let base = golden(base);
        let said =
            shop.train("run", "cpu", &[TOKENS, "base.compute=f32", "data.max_seq_len=200"]).succeeds().out;
        assert!(said.contains("embeddings and head are trained whole (lora.modules_to_save)"), "{said}");
        assert!(shop.read("run/recipe.toml").contains("modules_to_save = ["));
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            assert!(shop.path(&format!("run/adapter/{file}")).exists(), "{file}");
        }
        shop.pronk(["verify", "run"]).succeeds();
        let answer = generate(&shop, &base, &["--adapter", "run/adapter"]);
        for format in ["safetensors", "gguf"] {
            let merge =
                ["merge", "--base", &base, "--adapter", "run/adapter", "--format", format, "--out", format];
            let more: &[&str] = if format == "gguf" { &["--gguf-type", "f32"] } else { &["--dtype", "f32"] };
            shop.pronk(merge.iter().chain(more)).succeeds();
            let merged = if format == "gguf" { "gguf/model.gguf" } else { "safetensors" };
            assert_eq!(
                generate(&shop, merged, &["--template", "alpaca-short"]),
                answer,
                "{base} as {format}"
            );
        }
        let verbose = |base: &str, more: &[&str]| -> Run {
            let fixed = ["generate", "--base", base, "--instruction", "<|f|>", "--max-new-tokens", "1"];
            shop.pronk(fixed.iter().chain(&["--verbose-prompt", "--template", "alpaca-short"]).chain(more))
                .succeeds()
        };
        let last = if gguf { "69" } else { "265" };
        for run in [
            verbose(&base, &["--adapter", "run/adapter"]),
            verbose("safetensors", &[]),
            verbose("gguf/model.gguf", &[]),
        ] {
            assert!(run.err.contains(&format!(" {last},")), "{}", run.err);
        }
        // The base alone knows nothing of them.
        assert!(!verbose(&base, &[]).err.contains(&format!(" {last},")));
    }
}

#[test]
fn adapters_with_tokens_of_their_own_cannot_speak_at_once() {
    let shop = Workshop::new();
    shop.train("a", "cpu", &["tokens.add=['<|a|>']", "train.max_steps=2"]).succeeds();
    shop.train("b", "cpu", &["tokens.add=['<|b|>']", "train.max_steps=2"]).succeeds();
    let base = golden("tiny-gqa");
    let both = ["--adapter", "x=a/adapter", "--adapter", "y=b/adapter"];
    let fixed = ["generate", "--base", &base, "--instruction", "Hum."];
    shop.pronk(fixed.iter().chain(&both)).fails(&[
        "b/adapter/tokenizer.json: expected its token \"<|b|>\" as 260, found 261",
        "cannot be loaded together",
    ]);
    // One that goes on from another has its tokens, and may have more.
    let on = ["lora.init_adapter=a/adapter", "tokens.add=['<|b|>']", "train.max_steps=2"];
    shop.train("on", "cpu", &on).succeeds();
    let both = ["--adapter", "x=a/adapter", "--adapter", "y=on/adapter"];
    shop.pronk(fixed.iter().chain(&both)).succeeds();
}

#[test]
fn runtimes_that_take_low_rank_updates_alone_are_refused() {
    let shop = workshop("tiny-bias");
    shop.train("saved", "cpu", &[BOTH, "train.max_steps=2"]).succeeds();
    shop.train("biases", "cpu", &["lora.bias=all", "train.max_steps=2"]).succeeds();
    let before = shop.snapshot();
    for (run, knob) in [("saved", "lora.modules_to_save"), ("biases", "lora.bias")] {
        for to in ["gguf", "mlx", "ollama", "vllm", "mistralrs"] {
            let adapter = format!("{run}/adapter");
            let base = golden("tiny-bias");
            let export = ["export", "--base", &base, "--adapter", &adapter, "--to", to, "--out", "out"];
            shop.pronk(export).fails(&["is trained whole", knob, "low-rank updates alone", "pronk merge"]);
        }
        assert!(shop.read(&format!("{run}/adapter/README.md")).contains("The adapter alone does not load"));
    }
    assert_eq!(shop.snapshot(), before);
}

#[test]
fn adapters_are_told_combined_and_extracted_with_a_card() {
    let shop = workshop("tiny-bias");
    shop.train("biases", "cpu", &["lora.bias=lora_only", "train.max_steps=4"]).succeeds();
    assert!(info(&shop, "biases/adapter").contains("trained whole: 4 biases, 96 numbers\n"));
    let (base, gqa, rslora) = (golden("tiny-gqa"), golden("adapter-gqa"), golden("adapter-rslora"));
    let with = |other: &str, out: &str| {
        let fixed =
            ["adapter", "combine", "--adapter", &gqa, "--weight", "0.5", "--weight", "0.5", "--out", out];
        shop.pronk(fixed.iter().chain(&["--adapter", other]))
    };
    with("biases/adapter", "refused").fails(&["cannot be combined", "is trained whole", "pronk merge"]);
    assert!(!shop.path("refused").exists());
    #[cfg(unix)]
    {
        let linked = shop.path("linked");
        std::fs::create_dir(&linked).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            std::fs::copy(std::path::Path::new(&rslora).join(file), linked.join(file)).unwrap();
        }
        shop.write("secret", "words");
        std::os::unix::fs::symlink("../secret", linked.join("chat_template.jinja")).unwrap();
        with("linked", "refused").fails(&["linked/chat_template.jinja", "leads out of its folder"]);
        assert!(!shop.path("refused").exists());
    }
    with(&rslora, "combined").succeeds();
    let card = shop.read("combined/README.md");
    assert!(
        card.contains("| adapter-rslora | 0.5 |") && card.contains("weighted sum of their updates"),
        "{card}"
    );
    let merge = ["merge", "--base", &base, "--adapter", "combined", "--out", "merged", "--dtype", "f32"];
    shop.pronk(merge).succeeds();
    let extract =
        ["adapter", "extract", "--base", &base, "--tuned", "merged", "--rank", "12", "--out", "extracted"];
    shop.pronk(extract).succeeds();
    let card = shop.read("extracted/README.md");
    for word in ["taken out of `merged`", "of the difference's energy", "PeftModel.from_pretrained"] {
        assert!(card.contains(word), "{word}: {card}");
    }
    for folder in ["combined", "extracted"] {
        shop.pronk(["verify", folder]).succeeds();
    }
}

/// In the file as PEFT has them: float32, whatever the base is kept in.
#[test]
fn biases_are_saved_under_pefts_keys() {
    let shop = workshop("tiny-bias");
    shop.train("run", "cpu", &["lora.bias=all", "train.max_steps=2"]).succeeds();
    let file = shop.adapter("run");
    let names: Vec<String> = SafeTensors::deserialize(&file)
        .unwrap()
        .names()
        .into_iter()
        .filter(|name| name.ends_with("bias"))
        .map(|name| name.replace("base_model.model.model.layers.", ""))
        .collect();
    let mut expected: Vec<String> = Vec::new();
    for layer in [0, 1] {
        // Of q and v, which are adapted, within the adapted layer.
        expected.extend(["q", "v"].map(|m| format!("{layer}.self_attn.{m}_proj.base_layer.bias")));
        expected.extend(["k", "o"].map(|m| format!("{layer}.self_attn.{m}_proj.bias")));
    }
    let sorted = |mut names: Vec<String>| {
        names.sort();
        names
    };
    assert_eq!(sorted(names), sorted(expected));
}
