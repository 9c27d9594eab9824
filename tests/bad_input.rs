//! What a user can get wrong. Each: a message that says where and what, exit code 1, no panic, and nothing
//! half-written.
#![allow(clippy::unwrap_used, clippy::expect_used)] // in a test, a panic is the report

mod support;

use std::fs;

use support::{Workshop, golden, merge_args, prep_args, recipe, train_args};

/// Runs every command of `commands` in `shop`; each must fail with `words` and leave the folder as it was.
#[track_caller]
fn all_refuse(shop: &Workshop, commands: &[Vec<String>], words: &[&str]) {
    let before = shop.snapshot();
    for args in commands {
        shop.pronk(args).fails(words);
        let (after, names) = (shop.snapshot(), |s: &std::collections::BTreeMap<_, _>| {
            s.keys().cloned().collect::<Vec<std::path::PathBuf>>()
        });
        assert_eq!(names(&after), names(&before), "{args:?}");
        assert!(after == before, "{args:?} changed a file");
    }
}

/// A data file that `prep` and `train` must refuse.
#[track_caller]
fn data_refused(name: &str, content: &[u8], words: &[&str]) {
    let shop = Workshop::new();
    shop.write(name, content);
    let files = format!("data.files=['{name}']");
    let commands = [prep_args(name, &golden("tiny-gqa"), "out"), train_args("run", "cpu", &[&files])];
    all_refuse(&shop, &commands, &[words, &[name]].concat());
}

/// A base that every command must refuse.
#[track_caller]
fn base_refused(shop: &Workshop, base: &str, words: &[&str]) {
    shop.write("recipe.toml", recipe("tiny-gqa").replace(&golden("tiny-gqa"), base));
    let generate = ["generate", "--base", base, "--instruction", "Hum?"].map(str::to_owned).into();
    let commands = [
        prep_args("data.json", base, "out"),
        train_args("run", "cpu", &[]),
        merge_args(base, &golden("adapter-gqa"), "merged"),
        generate,
    ];
    all_refuse(shop, &commands, words);
}

#[test]
fn broken_json() {
    data_refused(
        "d.json",
        b"[{\"instruction\": \"a\", \"output\": \"b\"},\n {\"instruction\": \"a\", \"outp",
        &["broken JSON at line 2, column", "after 1 whole records", "EOF"],
    );
    data_refused(
        "d.jsonl",
        b"{\"instruction\": \"a\", \"output\": \"b\"}\n{\"instruction\": \"a\", }\n",
        &["1 of 2 records", "record 2 (line 2): broken JSON at column 22"],
    );
    data_refused("d.txt", b"Dear Sir or Madam", &["record 1 (line 1): broken JSON at column 1"]);
}

#[test]
fn wrong_field_types() {
    let data = b"[{\"instruction\": 1, \"output\": \"b\"}, {\"output\": null}, 3, {\"instruction\": \"a\", \
                 \"output\": [\"b\"], \"input\": {}}]";
    let words = [
        "4 of 4 records cannot be used",
        "record 1: `instruction` is a number, expected a string",
        "record 2: `instruction` is missing; `output` is null, expected a string",
        "record 3: expected an object with instruction and output, found a number",
        "record 4: `input` is an object, expected a string; `output` is a list, expected a string",
        "--skip-bad",
    ];
    data_refused("d.json", data, &words);
}

#[test]
fn conversations_that_cannot_be_learned() {
    let user = r#"{"role": "user", "content": "a"}"#;
    let data = format!(r#"[{{"messages": [{user}, {user}]}}, {{"messages": 3}}, {{"messages": [{user}]}}]"#);
    let words = [
        "3 of 3 records cannot be used",
        "record 1: message 2 of `messages` is the user's, as the one before it; expected the assistant's",
        "record 2: `messages` is a number, expected a list of messages",
        "record 3: `messages` has no answered question",
        "data.format",
    ];
    data_refused("d.json", data.as_bytes(), &words);
    let words =
        ["`instruction` is missing; `output` is missing; there are: question, answer", "data.columns"];
    data_refused("q.jsonl", b"{\"question\": \"a\", \"answer\": \"b\"}\n", &words);
    let words = ["the columns are question, answer", "expected instruction and output", "--column"];
    data_refused("q.csv", b"question,answer\na,b\n", &words);
    data_refused("d.csv", b"instruction,output\na,b\nc\n", &["record 2 (line 3): 1 fields, expected 2"]);
    data_refused("d.gz", b"\x1f\x8b\x08\x00 not gzip", &["cannot read the data file"]);
    data_refused("d.zst", b"\x28\xb5\x2f\xfd\x00", &["cannot read the data file"]);
}

#[test]
fn knobs_of_the_data_that_are_none() {
    let shop = Workshop::new();
    let cases = [
        ("data.format=sharegtp", "data.format: expected one of `auto`, `alpaca`, `sharegpt`"),
        ("data.learn=first", "data.learn: expected `all` or `last`, found \"first\""),
        ("data.columns.question=x", "data.columns: expected one of `instruction`, `input`"),
        (
            "data.files=[3]",
            "data.files: expected paths, or tables such as { path = \"a.json\", weight = 2.0 }",
        ),
        ("data.files=[{path='data.json', weight=-1}]", "weight = -1: expected a number from 0 to 1000"),
        (
            "data.files=[{path='data.json', weight=0}]",
            "expected weights that leave an epoch at least one row",
        ),
    ];
    for (set, words) in cases {
        all_refuse(&shop, &[train_args("run", "cpu", &[set])], &[words]);
    }
    let mut prep = prep_args("data.json", &golden("tiny-gqa"), "out");
    prep.extend(["--column", "question"].map(str::to_owned));
    all_refuse(&shop, &[prep], &["--column question: expected FIELD=NAME, such as instruction=question"]);
}

#[test]
fn starts_that_there_are_not() {
    let shop = Workshop::new();
    let cases: [(&[&str], &str); 9] = [
        (
            &["lora.init_lora_weights=pizza"],
            "lora.init_lora_weights: expected \"default\", \"gaussian\", \"pissa\"",
        ),
        (&["lora.init_lora_weights=pissa_niter_x"], "\"pissa_niter_16\""),
        (&["lora.init_lora_weights=loftq"], "expected base.quantize = \"nf4\" or \"int8\" beside it"),
        (&["lora.init_lora_weights=pissa", "lora.use_dora=true"], "lora.use_dora: expected false"),
        (
            &["lora.loftq_config={loftq_bits=4}"],
            "lora.loftq_config: expected restore_rank, or init_lora_weights",
        ),
        (
            &["lora.restore_rank=4"],
            "lora.restore_rank: expected base.quantize = \"nf4\" or \"int8\" beside it",
        ),
        (
            &["base.quantize=nf4", "lora.restore_rank=4", "lora.init_lora_weights=qera"],
            "lora.init_lora_weights: expected \"default\" or \"gaussian\" beside restore_rank",
        ),
        (
            &["base.quantize=nf4", "lora.restore_rank=4", "lora.use_dora=true"],
            "lora.restore_rank: expected 0 beside use_dora",
        ),
        (
            &[
                "base.quantize=nf4",
                "lora.init_lora_weights=loftq",
                "lora.loftq_config={loftq_bits=4, loftq_iter=5}",
            ],
            "lora.loftq_config.loftq_iter: expected 1: the base is quantized once",
        ),
    ];
    for (set, words) in cases {
        all_refuse(&shop, &[train_args("run", "cpu", set)], &[words]);
    }
    let skips = ["base.skip_modules=['down_proj']"];
    all_refuse(
        &shop,
        &[train_args("run", "cpu", &skips)],
        &["base.skip_modules: expected base.quantize = \"nf4\""],
    );
    let skips = ["base.quantize=nf4", "base.skip_modules=['down']"];
    let plan = ["plan", "recipe.toml", "--set", skips[0], "--set", skips[1]].map(str::to_owned).to_vec();
    let words = ["skip_modules: expected names", "found 'down'", "down_proj"];
    all_refuse(&shop, &[train_args("run", "cpu", &skips), plan], &words);
    let set = ["base.quantize=int8", "lora.init_lora_weights=loftq", "lora.loftq_config={loftq_bits=4}"];
    shop.train("run", "cpu", &set).fails(&["loftq_bits: expected 8, as the base is quantized to int8"]);
}

#[test]
fn invalid_utf8() {
    let data =
        b"{\"instruction\": \"a\", \"output\": \"b\"}\n{\"instruction\": \"\xe9t\xe9\", \"output\": \"b\"}\n";
    data_refused("latin1.jsonl", data, &["invalid UTF-8 at byte 53 (line 2)", "save the file as UTF-8"]);
    data_refused("d.bin", &[0x80; 64], &["invalid UTF-8 at byte 0"]);
}

#[test]
fn no_records() {
    data_refused("empty.json", b"", &["the file is empty", "expected a JSON array"]);
    data_refused("blank.jsonl", b"\n \n", &["the file is empty"]);
    data_refused("none.json", b"[]", &["holds no record", "instruction"]);
    data_refused("wrapped.json", b"{\n\"data\": [\n]}", &["one JSON object", "expected a JSON array"]);
}

#[test]
fn missing_files() {
    let shop = Workshop::new();
    let files = "data.files=['data.json', 'nowhere.json', 'nor-here.json']";
    let mut prep = prep_args("nowhere.json", &golden("tiny-gqa"), "out");
    prep.extend(["--data".to_owned(), "nor-here.json".to_owned()]);
    let words = ["nowhere.json: cannot read", "nor-here.json: cannot read", "No such file"];
    all_refuse(&shop, &[prep], &words);
    all_refuse(&shop, &[train_args("run", "cpu", &[files])], &["nowhere.json: cannot read", "No such file"]);
    let run = shop.pronk(["inspect", "data", "nowhere"]).fails(&["nowhere: cannot read the prepared file"]);
    assert_eq!(run.err.matches("No such file").count(), 1, "said once: {}", run.err);
    shop.pronk(["inspect", "data", "data.json"]).fails(&["not a prepared dataset", "pronk prep"]);
    shop.pronk(["train", "nowhere.toml"]).fails(&["nowhere.toml", "No such file"]);
    shop.pronk(["train"]).fails(&["RECIPE"]);
}

#[test]
fn limits_that_leave_nothing() {
    let shop = Workshop::new();
    let base = golden("tiny-gqa");
    let with = |flag: &str, value: &str| {
        [prep_args("data.json", &base, "out"), vec![flag.to_owned(), value.to_owned()]].concat()
    };
    all_refuse(&shop, &[with("--max-seq-len", "30")], &["none of 12 records is left", "max_seq_len = 30"]);
    all_refuse(&shop, &[with("--max-seq-len", "1")], &["max_seq_len = 1", "at least 2"]);
    all_refuse(&shop, &[with("--max-seq-len", "many")], &["--max-seq-len", "many"]);
    all_refuse(&shop, &[with("--val-size", "12")], &["val_size = 12", "fewer than the 12 rows"]);
    let train = train_args("run", "cpu", &["data.val_size=12"]);
    all_refuse(&shop, &[train], &["val_size = 12", "fewer than the 12 rows"]);
}

#[test]
fn damaged_safetensors() {
    let whole = fs::read(golden("tiny-gqa/model.safetensors")).unwrap();
    let claim = [&(1_u64 << 60).to_le_bytes()[..], b"{}"].concat();
    let mut letters = whole.clone();
    letters[8..12].copy_from_slice(b"wool");
    let damaged: [(&[u8], &str); 5] = [
        (&whole[..whole.len() - 1], "not a whole safetensors file"),
        (&whole[..50], "not a whole safetensors file"),
        (&claim, "header too large"),
        (b"", "not a whole safetensors file"),
        (&letters, "not a whole safetensors file"),
    ];
    for (bytes, words) in damaged {
        let shop = Workshop::new();
        fs::write(shop.copy_base("tiny-gqa", "base").join("model.safetensors"), bytes).unwrap();
        base_refused(&shop, "base", &["model.safetensors", words, "download it again"]);
    }

    let shop = Workshop::new();
    fs::remove_file(shop.copy_base("tiny-head-dim", "base").join("model-00002-of-00002.safetensors"))
        .unwrap();
    base_refused(&shop, "base", &["model-00002-of-00002.safetensors", "No such file"]);
}

#[test]
fn damaged_adapters() {
    let base = golden("tiny-gqa");
    let whole = fs::read(golden("adapter-gqa/adapter_model.safetensors")).unwrap();
    let claim = [&(1_u64 << 60).to_le_bytes()[..], b"{}"].concat();
    for bytes in [&whole[..whole.len() / 2], &claim, b""] {
        let shop = Workshop::new();
        fs::write(shop.copy_base("adapter-gqa", "adapter").join("adapter_model.safetensors"), bytes).unwrap();
        let generate = ["generate", "--base", &base, "--adapter", "adapter", "--instruction", "Hum?"];
        let init = train_args("run", "cpu", &["lora.init_adapter=adapter", "lora.alpha=8"]);
        let commands = [merge_args(&base, "adapter", "merged"), generate.map(str::to_owned).into(), init];
        all_refuse(&shop, &commands, &["adapter_model.safetensors", "not a whole safetensors file"]);
    }
    let shop = Workshop::new();
    fs::write(shop.copy_base("adapter-gqa", "adapter").join("adapter_config.json"), "{\"r\": 4").unwrap();
    all_refuse(&shop, &[merge_args(&base, "adapter", "merged")], &["adapter_config.json", "EOF"]);
}

/// A GGUF file's first bytes: magic, version, and how much of what is to come.
fn gguf(tensors: u64, entries: u64, rest: &[u8]) -> Vec<u8> {
    [b"GGUF", &3_u32.to_le_bytes()[..], &tensors.to_le_bytes(), &entries.to_le_bytes(), rest].concat()
}

#[test]
fn damaged_gguf() {
    let text = |s: &str| [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat();
    // one entry, a string; one tensor, float32 [64, 64] at the data's beginning
    let entry = [text("general.architecture"), 8_u32.to_le_bytes().to_vec(), text("llama")].concat();
    let tensor = [
        text("token_embd.weight"),
        [&2_u32.to_le_bytes()[..], &64_u64.to_le_bytes(), &64_u64.to_le_bytes()].concat(),
        [&0_u32.to_le_bytes()[..], &0_u64.to_le_bytes()].concat(),
    ]
    .concat();
    let file = gguf(1, 1, &[&entry[..], &tensor, &[0; 4096]].concat());
    let cases: [(&[u8], &[&str]); 6] = [
        (b"hello, this is no GGUF file", &["not a whole GGUF file", "magic"]),
        (b"", &["not a whole GGUF file"]),
        (&file[..20], &["not a whole GGUF file"]),
        (&file[..60], &["not a whole GGUF file"]),
        (&file, &["not a whole GGUF file", "token_embd.weight ends at byte", "the file at"]),
        (&gguf(1 << 60, 1 << 60, &[0; 100]), &["not a whole GGUF file"]),
    ];
    for (bytes, words) in cases {
        let shop = Workshop::new();
        shop.write("base.gguf", bytes);
        base_refused(&shop, "base.gguf", &[words, &["base.gguf", "download it again"]].concat());
        let run = shop.pronk(prep_args("data.json", "base.gguf", "out"));
        assert!(!run.err.contains("candle_core::"), "a backtrace is nothing for users: {}", run.err);
    }
}

#[test]
fn bases_that_are_none() {
    let shop = Workshop::new();
    base_refused(
        &shop,
        "nowhere",
        &["nowhere: no such base", "a Hugging Face directory, a .gguf file, or a hub id"],
    );
    base_refused(&shop, "nowhere.gguf", &["nowhere.gguf: no such base"]);
    base_refused(&shop, "data.json", &["data.json: expected a Hugging Face directory or a .gguf file"]);
    base_refused(
        &shop,
        "some-owner/some-model",
        &["some-owner/some-model", "as a hub id it could not be fetched", "Without a network, give the path"],
    );

    let shop = Workshop::new();
    let config = shop.copy_base("tiny-gqa", "base").join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("\"silu\"", "\"gelu\"").replace("\"llama\"", "\"mamba\"")).unwrap();
    base_refused(&shop, "base", &["config.json", "hidden_act", "gelu", "model_type", "mamba"]);
    fs::write(&config, text.replace("\"vocab_size\": 264", "\"vocab_size\": 300")).unwrap();
    base_refused(
        &shop,
        "base",
        &["model.embed_tokens.weight: expected shape [300, 32], found [264, 32]", "lm_head"],
    );
    fs::write(&config, &text[..text.len() / 2]).unwrap();
    base_refused(&shop, "base", &["config.json", "not a JSON document"]);
    fs::remove_file(&config).unwrap();
    base_refused(&shop, "base", &["config.json", "No such file"]);
}

#[test]
fn recipes_with_mistakes_name_them_all() {
    let shop = Workshop::new();
    let text = recipe("tiny-gqa")
        .replace("max_seq_len = 96", "max_sequence_len = 96\norder = 'random'\nskip_bad = 1")
        .replace("rank = 4", "rnak = 4\ndropout = 'none'")
        .replace("learning_rate = 1e-2", "learing_rate = 1e-2\nepochs = 0")
        .replace("batch_size = 4", "batch_size = '4'")
        .replace("[run]", "[rum]");
    shop.write("recipe.toml", text);
    let words = [
        "recipe.toml",
        "rum: unknown table; did you mean run?",
        "data.max_sequence_len: unknown knob; did you mean max_seq_len?",
        "data.order: expected `shuffle` or `sequential`, found \"random\"",
        "data.skip_bad: expected true or false, found 1",
        "lora.rnak: unknown knob; did you mean rank?",
        "lora.dropout: expected a number, found \"none\"",
        "train.learing_rate: unknown knob; did you mean learning_rate?",
        "train.batch_size: expected a whole number from 0, found \"4\"",
        "train.epochs: expected a number above 0, found 0",
        "run.dir: missing; expected the folder for the run",
    ];
    all_refuse(&shop, &[["train", "recipe.toml"].map(str::to_owned).into()], &words);

    shop.write("recipe.toml", "[train]\nmax_steps = 3\n");
    let missing =
        ["base.path: missing; expected a Hugging Face directory", "data.files: missing", "run.dir: missing"];
    all_refuse(&shop, &[["train", "recipe.toml"].map(str::to_owned).into()], &missing);
}

#[test]
fn recipes_that_are_no_toml() {
    let cases: [(&[u8], &[&str]); 4] = [
        (b"[base\npath = 1", &["line 1", "expected `]`"]),
        (b"[base]\npath = 'a'\npath = 'b'\n", &["line 3", "duplicate key"]),
        (b"[base]\npath = '\xff'", &["UTF-8"]),
        (b"base = 3\nlora = []\n", &["base: expected a table, found 3", "lora: expected a table, found []"]),
    ];
    for (text, words) in cases {
        let shop = Workshop::new();
        shop.write("recipe.toml", text);
        all_refuse(
            &shop,
            &[["train", "recipe.toml"].map(str::to_owned).into()],
            &[words, &["recipe.toml"]].concat(),
        );
    }
    let shop = Workshop::new();
    fs::copy(support::pronk_json(), shop.path("d.json")).unwrap();
    let run = shop.pronk(["train", "d.json"]).fails(&["d.json", "TOML"]);
    assert!(run.err.len() < 1000, "a page of data is no message: {}", run.err);
}

#[test]
fn knobs_out_of_range() {
    let shop = Workshop::new();
    let cases = [
        ("train.batch_size=0", "train.batch_size: expected a whole number from 1, found 0"),
        ("train.batch_size=-4", "train.batch_size: expected a whole number from 0, found -4"),
        ("train.max_steps=0", "train.max_steps: expected a whole number from 1, found 0"),
        ("train.learning_rate=0", "train.learning_rate: expected a number above 0, found 0"),
        ("train.learning_rate=nan", "train.learning_rate: expected a number above 0, found NaN"),
        ("train.max_grad_norm=-1", "train.max_grad_norm: expected a number from 0, found -1"),
        ("train.schedule=cosinus", "train.schedule: expected one of `cosine`, `linear`, `constant`"),
        ("train.recompute=all", "train.recompute: expected one of `auto`, `none`, `blocks`"),
        ("base.quantize=int4", "base.quantize: expected one of `none`, `nf4`, `int8`, found \"int4\""),
        ("base.quantize=true", "base.quantize: expected"),
        ("base.weights=floating", "base.weights: expected `resident` or `streamed`"),
        ("train.memory_budget=much", "train.memory_budget: expected a size such as"),
        ("train.memory_budget=-3GB", "train.memory_budget: expected a size such as"),
        ("lora.rank=0", "lora.rank: expected a whole number from 1, found 0"),
        ("lora.dropout=1", "lora.dropout"),
        ("data.max_seq_len=1", "data.max_seq_len: expected a whole number from 2, found 1"),
        ("data.template=alpacca", "did you mean \"alpaca\"?"),
        ("train.learingrate=1", "train.learingrate: unknown knob; did you mean learning_rate?"),
        ("trian.seed=1", "trian: unknown table; did you mean train?"),
        ("nonsense", "--set nonsense: expected table.knob=value"),
        ("train=3", "--set train=3: expected table.knob=value"),
    ];
    for (set, words) in cases {
        all_refuse(&shop, &[train_args("run", "cpu", &[set])], &[words]);
    }
}

/// Both before the first step, with the smallest budget that would do and what else would help.
#[test]
fn a_budget_too_small_for_one_block() {
    let shop = Workshop::new();
    let run = train_args("run", "cpu", &["train.memory_budget=1MB"]);
    let words = ["train.memory_budget", "1.0 MB", "at least", "micro_batch_size", "streamed", "nf4"];
    all_refuse(&shop, &[run], &words);
    let plan = ["plan", "recipe.toml", "--set", "train.memory_budget=1MB"];
    let run = shop.pronk(plan).fails(&["do not fit in train.memory_budget"]);
    assert!(run.out.contains("what to change") && run.out.contains("streamed"), "{}", run.out);
    shop.pronk(["plan", "recipe.toml", "--gpu", "rtx9999"]).fails(&["rtx9999", "rtx4090"]);
    shop.pronk(["plan", "recipe.toml", "--price", "-1"]).fails(&["--price", "from 0"]);
}

#[test]
fn devices_that_are_not_there() {
    let shop = Workshop::new();
    let base = golden("tiny-gqa");
    let on = |device: &str| {
        let mut merge = merge_args(&base, &golden("adapter-gqa"), "merged");
        merge.extend(["--device", device].map(str::to_owned));
        [train_args("run/deep", device, &[]), merge].map(|args| {
            args.into_iter().map(|arg| if arg == "DEVICE" { device.to_owned() } else { arg }).collect()
        })
    };
    all_refuse(&shop, &on("gpu"), &["device 'gpu' is unknown", "expected one of auto, cpu, cuda:N"]);
    all_refuse(&shop, &on("cpu:x"), &["device 'cpu:x' is unknown"]);
    all_refuse(&shop, &on("cpu:1"), &["device 'cpu:1' is not there", "found 1 cpu device(s)"]);
    let absent = [
        ("cuda", cfg!(feature = "cuda")),
        ("vulkan", cfg!(feature = "vulkan")),
        ("tch:cpu", cfg!(feature = "tch")),
    ];
    for (device, compiled_in) in absent {
        if !compiled_in {
            let feature = device.split(':').next().unwrap();
            let words = [format!("device '{device}' is not in this binary"), format!("--features {feature}")];
            all_refuse(&shop, &on(device), &words.each_ref().map(String::as_str));
        }
    }
}

/// A quantized checkpoint of another make, and one to be quantized once more.
#[test]
fn quantizations_that_do_not_fit() {
    let shop = Workshop::new();
    let config = shop.copy_base("tiny-gqa", "base").join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    let with = |quantization: &str| {
        let text = text.replacen('{', &format!("{{\"quantization_config\": {quantization},"), 1);
        fs::write(&config, text).unwrap();
    };
    with("{\"quant_method\": \"awq\"}");
    base_refused(&shop, "base", &["config.json", "\"awq\"} is not supported", "\"bitsandbytes\""]);

    let shop = Workshop::new();
    shop.train("run", "cpu", &["base.quantize=nf4"]).succeeds();
    let cached = fs::read_dir(shop.path(".quantized")).unwrap().next().unwrap().unwrap().path();
    let base = format!("base.path={}", cached.display());
    let again = train_args("again", "cpu", &[&base, "base.quantize=int8"]);
    all_refuse(&shop, &[again], &["to quantize to int8, found nf4", "leave quantize out"]);
    fs::remove_file(cached.join("pronk_cache.json")).unwrap();
    shop.train("third", "cpu", &["base.quantize=nf4"]).succeeds();

    // A cache that cannot be made: the run that asked for it is gone as well.
    let shop = Workshop::new();
    shop.write(".quantized", "a file");
    let train = train_args("run", "cpu", &["base.quantize=nf4"]);
    all_refuse(&shop, &[train], &[".quantized"]);
}

/// Whoever runs the tests, root included: nothing can be made below a file.
#[test]
fn an_output_below_a_file() {
    let shop = Workshop::new();
    let base = golden("tiny-gqa");
    all_refuse(&shop, &[prep_args("data.json", &base, "data.json/out")], &["data.json/out"]);
    all_refuse(&shop, &[train_args("data.json/run", "cpu", &[])], &["data.json/run", "Not a directory"]);
    all_refuse(&shop, &[train_args("data.json", "cpu", &[])], &["data.json"]);
    let merge = merge_args(&base, &golden("adapter-gqa"), "data.json/merged");
    all_refuse(&shop, &[merge], &["data.json/merged", "Not a directory"]);
    all_refuse(
        &shop,
        &[prep_args("data.json", &base, "nowhere/out")],
        &["nowhere/out", "there is no folder"],
    );
    all_refuse(
        &shop,
        &[prep_args("data.json", &base, ".")],
        &["expected the name of a file, found a directory"],
    );
    #[cfg(unix)]
    all_refuse(&shop, &[prep_args("data.json", &base, "/dev/null")], &["/dev/null", "found a device"]);
}
