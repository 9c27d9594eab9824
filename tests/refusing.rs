//! The list of what a user can get wrong, each driven through the real binary: one message with the place, what was
//! expected, what was found or what to do; exit code 1; and nothing written. What takes more than a line to set up
//! is in `bad_input.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used)] // in a test, a panic is the report

mod support;

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use support::{Workshop, golden};

/// What is wrong; how a good workshop comes to be so; the command; and what its message has to say.
type BadInput = (&'static str, Broken, &'static str, &'static [&'static str]);

/// What is broken before the command runs.
enum Broken {
    Nothing,
    /// A file with this content.
    File(&'static str, &'static [u8]),
    /// An empty folder.
    Folder(&'static str),
    /// The first half of a data table that the tests of `data` read whole.
    HalfTable(&'static str),
    /// A knob of `config.json` in a copy of the base; null takes it away.
    Config(&'static str, &'static str),
    /// The same in `adapter_config.json` in a copy of the adapter.
    Adapter(&'static str, &'static str),
    /// A file of a copy of the base that is gone.
    Gone(&'static str),
    /// A file of a copy of the base that holds this.
    Base(&'static str, &'static [u8]),
    /// The base's weights are said to be in this file.
    Shard(&'static str),
    /// A file of a copy of the adapter that holds this.
    AdapterFile(&'static str, &'static [u8]),
    /// A file of a copy of the adapter that is gone.
    AdapterGone(&'static str),
}
use Broken::{
    Adapter, AdapterFile, AdapterGone, Base, Config, File, Folder, Gone, HalfTable, Nothing, Shard,
};

/// `prep` of `data.json` with a base of this workshop's own, and other commands; BASE, OTHER and ADAPTER stand for
/// golden ones.
const PREP: &str = "prep --data data.json --base base --out out";
const DATA: &str = "prep --data d --base BASE --out out";
const TEMPLATE: &str = "prep --data data.json --base BASE --out out --template t.jinja";
const MERGE: &str = "merge --base BASE --adapter adapter --out merged";

#[rustfmt::skip] // a list, a line or two each
const BAD_INPUTS: &[BadInput] = &[
    // Recipes.
    ("a recipe that is not there", Nothing, "train nowhere.toml", &["nowhere.toml", "No such file"]),
    ("a folder for a recipe", Nothing, "train .", &["Is a directory"]),
    ("a recipe that is no TOML", File("r.toml", b"[base\npath"), "train r.toml", &["r.toml", "line 1", "expected `]`"]),
    ("a recipe in Latin-1", File("r.toml", b"[base]\npath = '\xe9'"), "train r.toml", &["r.toml", "UTF-8"]),
    ("an empty recipe", File("r.toml", b""), "train r.toml", &["base.path: missing", "data.files: missing", "run.dir: missing"]),
    ("a table's name with a typo", Nothing, "train recipe.toml --set trian.seed=1", &["trian: unknown table; did you mean train?"]),
    ("a knob's name with a typo", Nothing, "train recipe.toml --set train.learingrate=1", &["train.learingrate: unknown knob; did you mean learning_rate?"]),
    ("a change without a value", Nothing, "train recipe.toml --set nonsense", &["--set nonsense: expected table.knob=value"]),
    ("a text for a number", Nothing, "train recipe.toml --set train.save_patience=x", &["train.save_patience: expected a whole number from 0, found \"x\""]),
    ("half a step", Nothing, "train recipe.toml --set train.save_steps=1.5", &["train.save_steps: expected a whole number from 0, found 1.5"]),
    ("a number for a truth", Nothing, "train recipe.toml --set lora.use_dora=3", &["lora.use_dora: expected true or false, found 3"]),
    ("a number for a path", Nothing, "train recipe.toml --set base.path=3", &["base.path: expected a string, found 3"]),
    ("a number for a list", Nothing, "train recipe.toml --set data.files=3", &["data.files: expected a list, found 3"]),
    ("a number for a table", Nothing, "train recipe.toml --set lora.rank_pattern=3", &["lora.rank_pattern: expected a table", "found 3"]),
    ("a linear layer to train whole", Nothing, "train recipe.toml --set lora.modules_to_save=['o_proj']", &["lora.modules_to_save: expected embed_tokens or lm_head", "found o_proj"]),
    ("biases to train where there are none", Nothing, "train recipe.toml --set lora.bias=all", &["lora.bias: expected \"none\": no layer of this base has a bias, found \"all\""]),
    ("biases that are no choice", Nothing, "train recipe.toml --set lora.bias=some", &["lora.bias: expected one of `none`, `lora_only`, `all`, found \"some\""]),
    ("a token that is there already", Nothing, "train recipe.toml --set tokens.add=['</s>']", &["tokens.add: \"</s>\" is token 2 already; leave it out"]),
    ("a token twice", Nothing, "train recipe.toml --set tokens.add=['<|a|>','<|a|>']", &["tokens.add: \"<|a|>\" is token 260 already"]),
    ("a token of nothing", Nothing, "train recipe.toml --set tokens.add=['']", &["tokens.add: expected tokens with a letter or a sign in them, found \"\""]),
    ("a text for tokens", Nothing, "train recipe.toml --set tokens.add=<|a|>", &["tokens.add: expected a list, found \"<|a|>\""]),
    ("tokens over an adapter without embeddings", Nothing, "train recipe.toml --set lora.init_adapter=ADAPTER_PATH --set lora.alpha=8 --set tokens.add=['<|a|>']", &["lora.init_adapter", "trains nothing whole, the recipe lm_head.weight, model.embed_tokens.weight"]),
    ("no data files", Nothing, "train recipe.toml --set data.files=[]", &["data.files: missing; expected a list of instruction files"]),
    ("an unknown optimizer", Nothing, "train recipe.toml --set train.optimizer=sgd", &["train.optimizer: expected one of `adamw`", "found \"sgd\""]),
    ("an unknown schedule", Nothing, "train recipe.toml --set train.schedule=cosinus", &["train.schedule: expected one of `cosine`", "found \"cosinus\""]),
    ("an unknown way with NaN", Nothing, "train recipe.toml --set train.on_nan=ignore", &["train.on_nan: expected `stop` or `skip`, found \"ignore\""]),
    ("an unknown number format", Nothing, "train recipe.toml --set train.saved_inputs=f8", &["train.saved_inputs: expected one of `f32`, `bf16`, `host`, found \"f8\""]),
    ("an unknown order", Nothing, "train recipe.toml --set data.order=backwards", &["data.order: expected `shuffle` or `sequential`, found \"backwards\""]),
    ("an unknown quantization", Nothing, "train recipe.toml --set base.quantize=int4", &["base.quantize: expected one of `none`, `nf4`, `int8`, found \"int4\""]),
    ("an unknown data format", Nothing, "train recipe.toml --set data.format=sharegtp", &["data.format: expected one of `auto`", "`sharegpt`"]),
    ("no rank", Nothing, "train recipe.toml --set lora.rank=0", &["lora.rank: expected a whole number from 1, found 0"]),
    ("a dropout of all", Nothing, "train recipe.toml --set lora.dropout=1", &["lora.dropout: expected a number from 0 to below 1, found 1"]),
    ("an alpha of nothing", Nothing, "train recipe.toml --set lora.alpha=0", &["lora.alpha: expected a number above 0, found 0"]),
    ("layers that the base has not", Nothing, "train recipe.toml --set lora.target_modules=[\"x_proj\"]", &["lora.target_modules: [x_proj] matches no linear layer", "there are: down_proj"]),
    ("a learning rate that is no number", Nothing, "train recipe.toml --set train.learning_rate=nan", &["train.learning_rate: expected a number above 0, found NaN"]),
    ("epochs without end", Nothing, "train recipe.toml --set train.epochs=inf", &["train.epochs: expected a number above 0, found inf"]),
    ("an empty batch", Nothing, "train recipe.toml --set train.batch_size=0", &["train.batch_size: expected a whole number from 1, found 0"]),
    ("no checkpoint to keep", Nothing, "train recipe.toml --set train.keep_last=0", &["train.keep_last: expected a whole number from 1, found 0"]),
    ("a seed below zero", Nothing, "train recipe.toml --set train.seed=-1", &["train.seed: expected a whole number from 0, found -1"]),
    ("a budget that is no size", Nothing, "train recipe.toml --set train.memory_budget=much", &["train.memory_budget: expected", "found \"much\""]),
    ("a budget that nothing fits in", Nothing, "train recipe.toml --set train.memory_budget=1MB", &["train.memory_budget: 1.0 MB is too small", "at least", "micro_batch_size"]),
    ("all rows held out", Nothing, "train recipe.toml --set data.val_size=12", &["val_size = 12", "fewer than the 12 rows"]),
    ("an adapter to start from that is not there", Nothing, "train recipe.toml --set lora.init_adapter=nowhere", &["lora.init_adapter", "nowhere/adapter_config.json", "No such file"]),
    ("a recipe and a run to go on with", Nothing, "train recipe.toml --resume run", &["cannot be used with '--resume"]),
    ("a run that is not there", Nothing, "train --resume nowhere", &["nowhere/recipe.toml", "No such file"]),
    ("a file for a run", Nothing, "train --resume data.json", &["data.json/recipe.toml", "Not a directory"]),
    ("a run in a folder of another", File("run/metrics.jsonl", b"{}\n"), "train recipe.toml", &["run: holds a run already", "train --resume", "another run.dir"]),
    ("a device that is unknown", Nothing, "train recipe.toml --device gpu", &["device 'gpu' is unknown", "expected one of auto, cpu"]),
    ("a processor too many", Nothing, "train recipe.toml --device cpu:1", &["device 'cpu:1' is not there", "found 1 cpu device(s)"]),
    // Data.
    ("data that is not there", Nothing, "prep --data nowhere --base BASE --out out", &["nowhere: cannot read", "No such file"]),
    ("a folder for data", Folder("d"), DATA, &["d: cannot read the data file", "Is a directory"]),
    ("an empty file", File("d", b""), DATA, &["d: the file is empty", "expected a JSON array"]),
    ("an empty list", File("d", b"[]"), DATA, &["d", "holds no record"]),
    ("one object", File("d", b"{\n\"data\": [\n]}"), DATA, &["d", "one JSON object", "expected a JSON array"]),
    ("JSON that ends too soon", File("d", b"[{\"instruction\": \"a\", \"output\": \"b\"},\n {\"instr"), DATA, &["broken JSON at line 2, column", "after 1 whole records", "EOF"]),
    ("a line of broken JSON", File("d", b"{\"instruction\": \"a\", \"output\": \"b\"}\n{\"instruction\": }\n"), DATA, &["record 2 (line 2): broken JSON at column 17"]),
    ("data in Latin-1", File("d", b"[{\"instruction\": \"\xe9\", \"output\": \"b\"}]"), DATA, &["invalid UTF-8 at byte 18 (line 1)", "save the file as UTF-8"]),
    ("a number for a text", File("d", b"[{\"instruction\": 1, \"output\": \"b\"}]"), DATA, &["record 1: `instruction` is a number, expected a string", "--skip-bad"]),
    ("unknown fields", File("d", b"{\"question\": \"a\", \"answer\": \"b\"}\n"), DATA, &["`instruction` is missing", "there are: question, answer", "data.columns"]),
    ("unknown columns", File("d.csv", b"question,answer\na,b\n"), "prep --data d.csv --base BASE --out out", &["the columns are question, answer", "expected instruction and output", "--column"]),
    ("a ragged table", File("d.csv", b"instruction,output\na,b\nc\n"), "prep --data d.csv --base BASE --out out", &["record 2 (line 3): 1 fields, expected 2"]),
    ("a gzip stream that ends in a block", File("d", b"\x1f\x8b\x08\0\0\0\0\0\0\x03\x01\xff\xff\0\0[{"), DATA, &["d: cannot read the data file"]),
    ("a zstd stream of nothing", File("d", b"\x28\xb5\x2f\xfd\x00"), DATA, &["d: cannot read the data file"]),
    ("half a Parquet file", HalfTable("alpaca-zstd.parquet"), DATA, &["d: cannot be read as Parquet after 0 whole records", "again"]),
    ("an Arrow file without its end", File("d", b"ARROW1\0\0\x01\x01\x01\x01\x01\x01\x01\x01"), DATA, &["d: cannot be read as Arrow", "again"]),
    ("the user twice", File("d", br#"[{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}]"#), DATA, &["record 1: message 2 of `messages` is the user's", "expected the assistant's"]),
    ("records too long", Nothing, "prep --data data.json --base BASE --out out --max-seq-len 30", &["none of 12 records is left", "max_seq_len = 30"]),
    ("a column that is no field's", Nothing, "prep --data data.json --base BASE --out out --column question", &["--column question: expected FIELD=NAME"]),
    ("not a prepared file", Nothing, "inspect data data.json", &["data.json", "not a prepared dataset", "pronk prep"]),
    // Templates.
    ("a template's name with a typo", Nothing, "prep --data data.json --base BASE --out out --template alpacca", &["did you mean \"alpaca\"?"]),
    ("a template that is not there", Nothing, TEMPLATE, &["t.jinja", "built in are alpaca"]),
    ("a folder for a template", Folder("t.jinja"), TEMPLATE, &["t.jinja: cannot read the template", "Is a directory"]),
    ("a template that cannot be parsed", File("t.jinja", b"{{ output }}\n{% for x %}"), TEMPLATE, &["template t.jinja: line 2: syntax error"]),
    ("a template without an answer", File("t.jinja", b"{{ instruction }}"), TEMPLATE, &["t.jinja: never writes {{ output }}", "add it"]),
    ("a template without end", File("t.jinja", b"{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}{{ output }}"), TEMPLATE, &["template t.jinja: line 1", "fuel", "look for a loop"]),
    ("a base without a chat template", Nothing, "prep --data data.json --base BASE --out out --template chat", &["the base has no chat template", "take \"alpaca\""]),
    // Bases.
    ("a base that is not there", Nothing, "prep --data data.json --base nowhere --out out", &["nowhere: no such base", "expected a Hugging Face directory, a .gguf file, or a hub id"]),
    ("a hub without a network", Nothing, "prep --data data.json --base owner/model --out out", &["owner/model", "could not be fetched", "Without a network, give the path"]),
    ("a base without its configuration", Gone("config.json"), PREP, &["config.json", "No such file"]),
    ("a base without its tokenizer", Gone("tokenizer.json"), PREP, &["tokenizer.json: cannot read the tokenizer", "No such file"]),
    ("a base without weights", Gone("model.safetensors"), PREP, &["expected model.safetensors, or shards", "found neither"]),
    ("a configuration that is no JSON", Base("config.json", b"{\"a\": "), PREP, &["config.json", "not a JSON document"]),
    ("a tokenizer that is no JSON", Base("tokenizer.json", b"{\"a\": "), PREP, &["tokenizer.json: not a valid tokenizer.json", "line 1 column 6"]),
    ("a configuration without a size", Config("hidden_size", "null"), PREP, &["config.json", "hidden_size: missing"]),
    ("a size that is a text", Config("hidden_size", "\"32\""), PREP, &["hidden_size: expected a whole number from 1, found \"32\""]),
    ("another architecture", Config("model_type", "\"mamba\""), PREP, &["model_type: expected one of \"llama\"", "found \"mamba\""]),
    ("another activation", Config("hidden_act", "\"gelu\""), PREP, &["config.json", "hidden_act", "gelu"]),
    ("no heads", Config("num_attention_heads", "0"), PREP, &["num_attention_heads: expected a whole number from 1, found 0"]),
    ("heads that cannot be shared", Config("num_key_value_heads", "3"), PREP, &["num_attention_heads 4 is not a multiple of num_key_value_heads 3"]),
    ("layers beyond number", Config("num_hidden_layers", "1000000000000000"), PREP, &["num_hidden_layers: expected", "found 1000000000000000"]),
    ("other embeddings", Config("vocab_size", "300"), PREP, &["model.embed_tokens.weight: expected shape [300, 32], found [264, 32]"]),
    ("a header longer than the file", Base("model.safetensors", b"\0\0\0\0\0\0\0\x10{}"), PREP, &["model.safetensors", "header too large", "download it again"]),
    ("weights of no bytes", Base("model.safetensors", b""), PREP, &["model.safetensors", "not a whole safetensors file", "download it again"]),
    ("a shard outside of the folder", Shard("../../x.safetensors"), PREP, &["the shard name '../../x.safetensors' leaves the directory", "expected a plain file name"]),
    ("a shard at a place of its own", Shard("/etc/passwd"), PREP, &["the shard name '/etc/passwd' leaves the directory"]),
    ("a shard that is not there", Shard("x.safetensors"), PREP, &["x.safetensors", "No such file"]),
    ("half a GGUF header", File("b.gguf", b"GGUF\x03\0\0\0\x01\0\0"), "prep --data data.json --base b.gguf --out out", &["b.gguf", "not a whole GGUF file", "download it again"]),
    ("a GGUF file that is none", File("b.gguf", b"hello, this is none"), "prep --data data.json --base b.gguf --out out", &["b.gguf", "not a whole GGUF file", "magic"]),
    // Adapters.
    ("an adapter that is not there", Nothing, "merge --base BASE --adapter nowhere --out merged", &["nowhere/adapter_config.json", "No such file"]),
    ("an adapter without weights", AdapterGone("adapter_model.safetensors"), MERGE, &["adapter_model.safetensors", "No such file"]),
    ("weights of an adapter that are none", AdapterFile("adapter_model.safetensors", b"wool"), MERGE, &["adapter_model.safetensors", "not a whole safetensors file"]),
    ("an adapter's configuration cut", AdapterFile("adapter_config.json", b"{\"r\": 4"), MERGE, &["adapter_config.json", "EOF"]),
    ("an adapter of another base", Nothing, "merge --base OTHER --adapter ADAPTER --out merged", &["this adapter does not fit", "q_proj.lora_B.weight: expected shape [64, 4], found [32, 4]"]),
    ("another rank", Adapter("r", "7"), MERGE, &["this adapter does not fit", "expected shape [7, 32], found [4, 32]"]),
    ("an adapter of another kind", Adapter("peft_type", "\"IA3\""), MERGE, &["adapter_config.json: expected peft_type \"LORA\", found \"IA3\""]),
    ("an adapter of layers that are not there", Adapter("target_modules", "[\"w_proj\"]"), MERGE, &["target_modules: [w_proj] matches no linear layer", "there are: down_proj"]),
    ("an alpha that is a text", Adapter("lora_alpha", "\"x\""), MERGE, &["adapter_config.json: lora_alpha: expected a number, found \"x\""]),
    ("biases by another word", Adapter("bias", "\"some\""), MERGE, &["adapter_config.json: bias: unknown variant `some`", "`none`, `lora_only`, `all`"]),
    ("a saved module that is not in the file", Adapter("modules_to_save", "[\"lm_head\"]"), MERGE, &["this adapter does not fit", "base_model.model.lm_head.weight: missing"]),
    ("a saved module that nobody trains whole", Adapter("modules_to_save", "[\"norm\"]"), MERGE, &["modules_to_save: expected embed_tokens or lm_head", "found norm"]),
    ("a tokenizer of another base beside the adapter", AdapterFile("tokenizer.json", b"{\"added_tokens\": [{\"id\": 7, \"content\": \"<|hum|>\", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, \"normalized\": false, \"special\": false}]}"), MERGE, &["adapter/tokenizer.json: expected its token \"<|hum|>\" as 7, found 260", "another base"]),
    ("half a tokenizer beside the adapter", AdapterFile("tokenizer.json", b"{\"added"), MERGE, &["adapter/tokenizer.json: not a valid tokenizer.json", "EOF"]),
    // Outputs and arguments.
    ("a file for a merged model", Nothing, "merge --base BASE --adapter ADAPTER --out data.json", &["data.json: cannot write to this directory", "found a file", "choose another path"]),
    ("a folder with something in it", File("full/x", b"x"), "merge --base BASE --adapter ADAPTER --out full", &["full: cannot write to this directory", "found a directory with something in it"]),
    ("an output below a file", Nothing, "prep --data data.json --base BASE --out data.json/out", &["data.json/out"]),
    ("an output in no folder", Nothing, "prep --data data.json --base BASE --out nowhere/out", &["nowhere/out", "there is no folder"]),
    ("nothing to verify", Nothing, "verify nowhere", &["nowhere: expected a run's folder", "found none"]),
    ("an unknown command", Nothing, "frobnicate", &["unrecognized subcommand 'frobnicate'"]),
    ("an unknown number format for a merge", Nothing, "merge --base BASE --adapter ADAPTER --out merged --dtype int3", &["invalid value 'int3'", "f32, f16, bf16"]),
    ("a temperature below zero", Nothing, "generate --base BASE --instruction Hum? --temperature -3", &["--temperature: expected a number from 0, found -3"]),
    ("more than all of the probability", Nothing, "generate --base BASE --instruction Hum? --top-p 3", &["--top-p: expected a number above 0, up to 1, found 3"]),
    ("an unknown card", Nothing, "plan recipe.toml --gpu rtx9999", &["rtx9999", "rtx4090"]),
    ("no steps to measure", Nothing, "bench recipe.toml --steps 0", &["--steps: expected a whole number from 1, found 0"]),
];

impl Broken {
    fn set_up(&self, shop: &Workshop) {
        match self {
            Nothing => {}
            File(name, content) => drop(shop.write(name, content)),
            Folder(name) => fs::create_dir(shop.path(name)).unwrap(),
            HalfTable(name) => {
                let tables = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/tests/tables");
                let whole = fs::read(tables.join(name)).unwrap();
                shop.write("d", &whole[..whole.len() / 2]);
            }
            Config(knob, value) => set(&shop.copy_base("tiny-gqa", "base").join("config.json"), knob, value),
            Adapter(knob, value) => {
                set(&shop.copy_base("adapter-gqa", "adapter").join("adapter_config.json"), knob, value);
            }
            Gone(name) => fs::remove_file(shop.copy_base("tiny-gqa", "base").join(name)).unwrap(),
            Base(name, content) => {
                fs::write(shop.copy_base("tiny-gqa", "base").join(name), content).unwrap();
            }
            Shard(name) => {
                let base = shop.copy_base("tiny-gqa", "base");
                fs::remove_file(base.join("model.safetensors")).unwrap();
                let index = json!({"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}});
                fs::write(base.join("model.safetensors.index.json"), index.to_string()).unwrap();
            }
            AdapterFile(name, content) => {
                fs::write(shop.copy_base("adapter-gqa", "adapter").join(name), content).unwrap();
            }
            AdapterGone(name) => {
                fs::remove_file(shop.copy_base("adapter-gqa", "adapter").join(name)).unwrap();
            }
        }
    }
}

/// Sets a knob of a JSON file; null takes it away.
fn set(file: &Path, knob: &str, value: &str) {
    let mut json: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    let knobs = json.as_object_mut().unwrap();
    match serde_json::from_str(value).unwrap() {
        Value::Null => drop(knobs.remove(knob).unwrap()),
        value => drop(knobs.insert(knob.to_owned(), value)),
    }
    fs::write(file, json.to_string()).unwrap();
}

#[test]
fn every_bad_input_is_told_from_the_others_and_writes_nothing() {
    let (mut told, mut wrong): (Vec<(&str, String)>, Vec<String>) = (Vec::new(), Vec::new());
    for (name, broken, command, words) in BAD_INPUTS {
        let shop = Workshop::new();
        broken.set_up(&shop);
        let golden = |word: &str| match word {
            "BASE" => golden("tiny-gqa"),
            "OTHER" => golden("tiny-head-dim"),
            "ADAPTER" => golden("adapter-gqa"),
            "lora.init_adapter=ADAPTER_PATH" => format!("lora.init_adapter={}", golden("adapter-gqa")),
            word => word.to_owned(),
        };
        let before = shop.snapshot();
        let run = shop.pronk(command.split(' ').map(golden));
        let mut must = |holds: bool, what: &str| {
            if !holds {
                wrong.push(format!("{name}: {what}: exit code {:?}\n{}", run.code, run.err));
            }
        };
        must(run.code == Some(1), "expected exit code 1");
        for word in *words {
            must(run.err.contains(word), &format!("expected {word:?} in what is told"));
        }
        for word in ["panicked", "bug in pronk", "RUST_BACKTRACE"] {
            must(!run.err.contains(word), word);
        }
        must(run.err.len() < 4000, "a page is no message");
        let mut after = shop.snapshot();
        after.retain(|path, _| !path.starts_with(shop.path(".hub"))); // the cache's own folders
        must(after == before, "wrote something");
        let same = told.iter().find(|(_, err)| *err == run.err);
        must(same.is_none(), &format!("told as {:?}", same.map(|(name, _)| name)));
        told.push((name, run.err.clone()));
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), told.len(), wrong.join("\n"));
    assert!(told.len() >= 60, "{} bad inputs", told.len());
}
