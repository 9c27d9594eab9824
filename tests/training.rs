//! `pronk train`, as its user runs it: what it writes, what it computes, how it stops and goes on.
#![allow(clippy::unwrap_used, clippy::expect_used)] // in a test, a panic is the report

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};

use safetensors::SafeTensors;
use support::{
    Workshop, command, devices, golden, hears_ctrl_c, json, prompt, recipe, records, tensor, train_args,
};

const KEYS: [&str; 10] = [
    "epoch",
    "grad_norm",
    "learning_rate",
    "loss",
    "peak_memory_bytes",
    "seconds",
    "step",
    "supervised_tokens",
    "tokens",
    "tokens_per_s",
];

#[test]
fn a_run_writes_what_it_promises() {
    for device in devices() {
        let shop = Workshop::new();
        let run = shop.train("run", device, &[]).succeeds();
        assert!(run.out.contains("finished 8 steps") && run.out.contains("eval loss"), "{}", run.out);
        assert!(run.err.contains("step 8/8"), "{}", run.err);

        let lines = shop.metrics("run");
        assert_eq!(lines.len(), 9, "the base's eval loss, and a line a step");
        let before: BTreeSet<&str> = lines[0].as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(before, BTreeSet::from(["epoch", "eval_loss", "step"]));
        for (step, line) in lines.iter().enumerate().skip(1) {
            let mut expected = BTreeSet::from(KEYS);
            if step % 4 == 0 {
                expected.insert("eval_loss");
            }
            let found: BTreeSet<&str> = line.as_object().unwrap().keys().map(String::as_str).collect();
            assert_eq!(found, expected, "step {step}");
            assert_eq!(line["step"], step);
        }

        let resolved: toml::Table = shop.read("run/recipe.toml").parse().unwrap();
        assert_eq!(resolved["train"]["weight_decay"].as_float(), Some(0.0), "defaults are filled in");
        assert!(resolved["data"]["files"][0].as_str().unwrap().starts_with('/'));
        let samples = shop.read("run/samples.md");
        for part in ["before training", "after step 4", "after step 8", "### Instruction:"] {
            assert!(samples.contains(part), "{part}");
        }
        let adapter: serde_json::Value =
            serde_json::from_str(&shop.read("run/adapter/adapter_config.json")).unwrap();
        assert_eq!((&adapter["peft_type"], &adapter["r"]), (&"LORA".into(), &4.into()));
        assert!(shop.read("run/adapter/README.md").contains("alpaca-short"));
        let checkpoints = fs::read_dir(shop.path("run/checkpoints")).unwrap();
        let mut names: Vec<_> = checkpoints.map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["step-000006", "step-000008"]);
    }
}

/// The first step's loss against one worked out by hand from `pronk inspect logits`.
#[test]
fn loss_is_the_mean_over_supervised_tokens_and_tokens_are_real() {
    for device in devices() {
        let shop = Workshop::new();
        let records = [("Hum?", "Yes, hum, and then some more."), ("A much longer question, is it?", "No.")]
            .map(|(i, o)| (i.to_owned(), o.to_owned()));
        shop.write("data.json", json(&records));
        let (mut sum, mut supervised, mut tokens) = (0.0, 0, 0);
        for (instruction, output) in &records {
            let text = prompt(instruction) + output;
            let run = [
                "inspect",
                "logits",
                "--base",
                &golden("tiny-gqa"),
                "--text",
                &text,
                "--out",
                "l",
                "--device",
                device,
            ];
            shop.pronk(run).succeeds();
            let file = shop.bytes("l");
            let (logits, shape) = tensor(&file, "logits");
            let file = SafeTensors::deserialize(&file).unwrap();
            let ids = file.tensor("token_ids").unwrap();
            let ids = ids.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as usize);
            let mut ids: Vec<usize> = ids.collect();
            assert_eq!(ids.len(), 1 + text.len(), "<s>, then a token a byte");
            ids.push(2); // the end of sequence is learned, and seen by nobody
            for position in 1 + prompt(instruction).len()..ids.len() {
                let row: Vec<f64> =
                    logits[(position - 1) * shape[1]..][..shape[1]].iter().map(|&x| f64::from(x)).collect();
                let max = row.iter().copied().fold(f64::MIN, f64::max);
                let log_sum = max + row.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
                sum += log_sum - row[ids[position]];
                supervised += 1;
            }
            tokens += ids.len();
        }
        // Records of unlike length, each in a micro-batch of its own: a mean of means would be another.
        let set = [
            "base.compute=f32",
            "data.val_size=0",
            "train.batch_size=2",
            "train.micro_batch_size=1",
            "data.packing=false",
            "train.max_steps=2",
        ];
        shop.train("run", device, &set).succeeds();
        let line = &shop.metrics("run")[0];
        assert_eq!((&line["tokens"], &line["supervised_tokens"]), (&tokens.into(), &supervised.into()));
        let (expected, found) = (sum / f64::from(supervised), line["loss"].as_f64().unwrap());
        assert!((expected - found).abs() < 1e-4 * expected, "{expected} {found}");
    }
}

#[test]
fn the_loss_falls() {
    for device in devices() {
        let shop = Workshop::new();
        let set = ["train.max_steps=40", "train.learning_rate=2e-2", "lora.target_modules=all-linear"];
        let run = shop.train("run", device, &set).succeeds();
        let losses = shop.losses("run");
        let (first, last) = (losses[0], losses[losses.len() - 1]);
        assert!(last < 0.6 * first, "{losses:?}");
        let evals: Vec<f64> =
            shop.metrics("run").iter().filter_map(|line| line["eval_loss"].as_f64()).collect();
        let best = evals.iter().copied().fold(f64::MAX, f64::min);
        assert!(best < evals[0], "{evals:?}");
        assert!(run.out.contains(&format!("{:.4} before, {best:.4} after", evals[0])), "{}", run.out);
    }
}

#[test]
fn a_real_data_set_trains() {
    let shop = Workshop::new();
    fs::copy(support::pronk_json(), shop.path("data.json")).unwrap();
    let set = ["data.max_seq_len=512", "train.max_steps=2", "data.val_size=4", "train.eval_steps=0"];
    let run = shop.train("run", "cpu", &set).succeeds();
    assert!(run.out.contains("records") && run.out.contains("supervised tokens"), "{}", run.out);
    assert_eq!(shop.losses("run").len(), 2);
}

#[test]
fn recompute_changes_memory_and_nothing_else() {
    for device in devices() {
        let ways: [(&str, &[&str]); 2] =
            [("blocks", &["train.recompute=blocks"]), ("none", &["train.recompute=none"])];
        Workshop::new().trains_alike(device, &ways, &["lora.dropout=0.1", "lora.target_modules=all-linear"]);
    }
}

/// What is kept is chosen by memory, and where weights come from is: never what is computed.
#[test]
fn budgets_and_streaming_change_memory_and_nothing_else() {
    for device in devices() {
        let shop = Workshop::new();
        let ways: [(&str, &[&str]); 4] = [
            ("resident", &["base.quantize=nf4"]),
            ("streamed", &["base.quantize=nf4", "base.weights=streamed"]),
            ("all", &["base.quantize=nf4", "train.recompute=auto", "train.memory_budget=4GB"]),
            ("none", &["base.quantize=nf4", "train.recompute=auto", "train.memory_budget=74MiB"]),
        ];
        shop.trains_alike(device, &ways, &[]);
    }
}

#[test]
fn micro_batches_change_memory_and_nothing_else() {
    for device in devices() {
        let shop = Workshop::new();
        shop.train("one", device, &["train.micro_batch_size=1", "base.compute=f32"]).succeeds();
        shop.train("four", device, &["train.micro_batch_size=4", "base.compute=f32"]).succeeds();
        for (one, four) in shop.losses("one").iter().zip(shop.losses("four")) {
            assert!((one - four).abs() < 1e-5 * one, "{one} {four}");
        }
        let tokens = |run| shop.metrics(run).iter().map(|l| l["tokens"].clone()).collect::<Vec<_>>();
        assert_eq!(tokens("one"), tokens("four"), "nothing is padded");
    }
}

/// Packed, grouped by length, or one by one: the same losses.
#[test]
fn packing_changes_memory_and_nothing_else() {
    for device in devices() {
        let shop = Workshop::new();
        let ways: [(&str, &[&str]); 3] = [
            ("packed", &["data.packing=true", "train.micro_batch_size=2"]),
            ("grouped", &["data.packing=false", "train.micro_batch_size=2"]),
            ("alone", &["data.packing=false", "train.micro_batch_size=1"]),
        ];
        for (run, set) in ways {
            let set = [set, &["base.compute=f32"]].concat();
            shop.train(run, device, &set).succeeds();
            for (loss, alone) in shop.losses(run).iter().zip(shop.losses("packed")) {
                assert!((loss - alone).abs() < 1e-5 * alone, "{run}: {loss} {alone}");
            }
        }
        assert_eq!(shop.losses("grouped").len(), 8);
    }
}

/// What is left out is found, said, and written down, so that whoever goes on does as before.
#[test]
fn sizes_left_out_are_found() {
    let shop = Workshop::new();
    let left_out =
        shop.read("recipe.toml").replace("max_seq_len = 96\n", "").replace("micro_batch_size = 2\n", "");
    shop.write("recipe.toml", left_out);
    let run = shop.train("run", "cpu", &["base.compute=f32"]).succeeds();
    assert!(run.out.contains("train.micro_batch_size = 4: the whole batch"), "{}", run.out);
    let written: toml::Table = shop.read("run/recipe.toml").parse().unwrap();
    let longest = written["data"]["max_seq_len"].as_integer().unwrap();
    assert!((60..96).contains(&longest), "{longest}");
    assert_eq!(written["train"]["micro_batch_size"].as_integer(), Some(4));
    // The same as with the sizes set; and there is nothing left to find when it goes on.
    let set =
        [format!("data.max_seq_len={longest}"), "train.micro_batch_size=4".into(), "base.compute=f32".into()];
    shop.train("set", "cpu", &set.iter().map(String::as_str).collect::<Vec<_>>()).succeeds();
    assert_eq!(shop.bytes("run/prepared.safetensors"), shop.bytes("set/prepared.safetensors"));
    assert_eq!(shop.adapter("run"), shop.adapter("set"));
    fs::remove_dir_all(shop.path("run/checkpoints/step-000008")).unwrap();
    let again = shop.resume("run", "cpu", &[]).succeeds();
    assert!(!again.out.contains("micro_batch_size"), "{}", again.out);
    assert_eq!(shop.timeless_metrics("run"), shop.timeless_metrics("set"));
}

#[test]
fn saved_inputs_in_bf16_train_alike_and_on_the_host_the_same() {
    for device in devices() {
        let shop = Workshop::new();
        let common = ["train.recompute=blocks", "base.compute=f32"];
        for (run, inputs) in [("f32", "f32"), ("host", "host"), ("bf16", "bf16")] {
            let inputs = format!("train.saved_inputs={inputs}");
            shop.train(run, device, &[common[0], common[1], &inputs]).succeeds();
        }
        assert_eq!(shop.adapter("host"), shop.adapter("f32"));
        assert_ne!(shop.adapter("bf16"), shop.adapter("f32"));
        for (bf16, f32) in shop.losses("bf16").iter().zip(shop.losses("f32")) {
            assert!((bf16 - f32).abs() < 1e-2 * f32, "{bf16} {f32}");
        }
    }
}

#[test]
fn a_profile_shows_the_parts_of_every_step() {
    for device in devices() {
        let shop = Workshop::new();
        let args = train_args("run", device, &["train.recompute=blocks"]);
        shop.pronk(args.iter().map(String::as_str).chain(["--profile", "trace.json"])).succeeds();
        let events: Vec<serde_json::Value> = serde_json::from_str(&shop.read("trace.json")).unwrap();
        let count = |name: &str| events.iter().filter(|event| event["name"] == name).count();
        assert_eq!(count("step"), 8);
        assert!(count("micro_batch") >= 8 && count("data") == 8 && count("optimizer") == 8);
        // Two blocks, and no rehearsal: there is memory enough.
        for name in ["forward", "recompute", "backward"] {
            assert_eq!(count(name), 2 * count("micro_batch"), "{name}");
        }
        // Saves are written while the next step computes.
        let lane = |number: u64| events.iter().filter(move |event| event["tid"] == number);
        let time = |event: &serde_json::Value, key: &str| event[key].as_f64().unwrap();
        let (begin, end) = (|e| time(e, "ts"), |e| time(e, "ts") + time(e, "dur"));
        let steps: Vec<_> = lane(1).filter(|event| event["name"] == "step").collect();
        let meanwhile = lane(2)
            .filter(|save| steps.iter().any(|step| begin(step) < end(save) && begin(save) < end(step)));
        assert!(meanwhile.count() > 0, "{events:#?}");
        assert!(lane(2).all(|event| event["name"] == "save"));
        assert!(count("save") >= 4 && count("eval") == 3 && count("product") > 100 && count("attention") > 8);
    }
    let shop = Workshop::new();
    let args = train_args("run", "cpu", &[]);
    let run = shop.pronk(args.iter().map(String::as_str).chain(["--profile", "no/where.json"]));
    run.fails(&["--profile no/where.json"]);
    assert!(!shop.path("run").exists());
}

#[test]
fn a_benchmark_measures_steps_and_leaves_nothing() {
    let shop = Workshop::new();
    let before = shop.snapshot();
    for device in devices() {
        let bench = ["bench", "recipe.toml", "--steps", "3", "--warmup", "1", "--device", device];
        let table = shop.pronk(bench).succeeds().out;
        for line in ["tokens a second", "forward", "optimizer", "utilization", "seconds to the first step"] {
            assert!(table.contains(line), "{line}: {table}");
        }
        let json = shop.pronk(bench.into_iter().chain(["--json"])).succeeds().out;
        let found: serde_json::Value = serde_json::from_str(json.lines().last().unwrap()).unwrap();
        let number = |key: &str| found[key].as_f64().unwrap_or_else(|| panic!("{key}: {found}"));
        assert_eq!((&found["steps"], &found["device"]), (&3.into(), &device.into()));
        let parts = found["parts"].as_object().unwrap().values().map(|v| v.as_f64().unwrap());
        assert!((parts.sum::<f64>() / number("seconds") - 1.0).abs() < 0.01, "{found}");
        let shares = ["products_share", "adapter_share", "attention_share"].map(number);
        assert!(shares.iter().all(|&share| share > 0.0) && shares.iter().sum::<f64>() < 1.0);
        assert!(number("supervised_tokens_per_s") < number("tokens_per_s"));
        let (model, peak) = (number("model_operations_per_s"), number("peak_operations_per_s"));
        assert!(model > 0.0 && (number("utilization") / (model / peak) - 1.0).abs() < 1e-9);
    }
    assert_eq!(shop.snapshot(), before);
    shop.pronk(["bench", "recipe.toml", "--steps", "0"]).fails(&["--steps: expected a whole number from 1"]);
}

/// Every optimizer learns, and goes on from its checkpoint as if nothing had happened.
#[test]
fn every_optimizer_learns_and_goes_on() {
    for device in devices() {
        let shop = Workshop::new();
        for (optimizer, rate) in
            [("adamw", "1e-2"), ("adamw8bit", "1e-2"), ("lion", "3e-3"), ("muon", "2e-2")]
        {
            let set = [
                format!("train.optimizer={optimizer}"),
                format!("train.learning_rate={rate}"),
                "train.lora_plus_ratio=2".into(),
                "train.neftune_noise_alpha=1".into(),
                "train.weight_decay=0.01".into(),
            ];
            let set: Vec<&str> = set.iter().map(String::as_str).collect();
            let stopped = format!("{optimizer}-stopped");
            shop.train(optimizer, device, &set).succeeds();
            shop.train(&stopped, device, &set).succeeds();
            fs::remove_dir_all(shop.path(&format!("{stopped}/checkpoints/step-000008"))).unwrap();
            fs::remove_dir_all(shop.path(&format!("{stopped}/adapter"))).unwrap();
            shop.resume(&stopped, device, &[]).succeeds();
            assert_eq!(shop.timeless_metrics(&stopped), shop.timeless_metrics(optimizer), "{optimizer}");
            let newest = "checkpoints/step-000008/optimizer.safetensors";
            assert!(
                shop.bytes(&format!("{stopped}/{newest}")) == shop.bytes(&format!("{optimizer}/{newest}"))
            );
            let evals: Vec<f64> =
                shop.metrics(optimizer).iter().filter_map(|line| line["eval_loss"].as_f64()).collect();
            assert!(evals[2] < evals[0], "{optimizer}: {evals:?}");
        }
        let other = ["train.optimizer=adamw", "train.max_steps=9"];
        let words =
            ["recipe: train.optimizer was \"lion\", is \"adamw\"", "recipe: train.max_steps was 8, is 9"];
        shop.resume("lion-stopped", device, &other).fails(&words);
        let run = shop.resume_changed("lion-stopped", device, &other);
        run.fails(&["checkpoints/step-000008/optimizer.safetensors", "lora_A.m"]);
    }
}

/// Noise is for what is learned from: the base's own loss sees none of it.
#[test]
fn neftune_noise_changes_training_and_not_evaluation() {
    let shop = Workshop::new();
    shop.train("still", "cpu", &[]).succeeds();
    shop.train("noisy", "cpu", &["train.neftune_noise_alpha=5"]).succeeds();
    shop.train("again", "cpu", &["train.neftune_noise_alpha=5", "train.recompute=blocks"]).succeeds();
    assert_eq!(shop.metrics("still")[0], shop.metrics("noisy")[0], "the base, measured");
    assert_ne!(shop.losses("still"), shop.losses("noisy"));
    assert_eq!(shop.timeless_metrics("noisy"), shop.timeless_metrics("again"));
    let refused = shop.train("no", "cpu", &["train.neftune_noise_alpha=-1", "train.lora_plus_ratio=0"]);
    refused.fails(&["train.neftune_noise_alpha: expected a number from 0", "train.lora_plus_ratio"]);
}

#[test]
fn one_seed_is_one_run() {
    let shop = Workshop::new();
    for (run, seed) in [("a", "train.seed=7"), ("b", "train.seed=7"), ("c", "train.seed=8")] {
        shop.train(run, "cpu", &["lora.dropout=0.2", seed]).succeeds();
    }
    assert_eq!(shop.timeless_metrics("a"), shop.timeless_metrics("b"));
    assert_eq!(shop.adapter("a"), shop.adapter("b"));
    assert_ne!(shop.adapter("a"), shop.adapter("c"));
}

/// Ctrl-C saves and says how to go on; the run that goes on is the run that was never stopped.
#[cfg(unix)]
#[test]
fn an_interrupted_run_goes_on_as_if_nothing_had_happened() {
    if !hears_ctrl_c() {
        return;
    }
    for device in devices() {
        let shop = Workshop::new();
        // A constant schedule does not look at the number of steps, so that the long run, which will
        // not end before the signal comes, and the short one take the same steps.
        let fixed = ["train.schedule=constant", "lora.dropout=0.1", "train.learning_rate=1e-3"];
        let long: Vec<&str> = fixed.iter().copied().chain(["train.max_steps=100000"]).collect();
        let mut child = command(shop.root())
            .args(train_args("stopped", device, &long))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        lines.find(|line| line.as_ref().unwrap().starts_with("step 3/")).expect("a third step").unwrap();
        let pid = child.id().to_string();
        assert!(Command::new("sh").args(["-c", &format!("kill -INT {pid}")]).status().unwrap().success());
        let err: Vec<String> = lines.map(Result::unwrap).collect();
        let mut out = String::new();
        child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(130), "{out}\n{err:?}");
        assert!(err.iter().any(|line| line.contains("finishing this step")), "{err:?}");
        assert!(out.contains("go on with: pronk train --resume"), "{out}");

        let stopped_at = shop.losses("stopped").len();
        let steps = format!("train.max_steps={}", stopped_at + 5);
        shop.resume_changed("stopped", device, &[&steps]).succeeds();
        let alone: Vec<&str> = fixed.iter().copied().chain([steps.as_str()]).collect();
        shop.train("alone", device, &alone).succeeds();
        let losses = shop.losses("stopped");
        assert_eq!(losses.len(), stopped_at + 5);
        assert_eq!(losses, shop.losses("alone"));
        let newest = format!("checkpoints/step-{:06}/adapter_model.safetensors", stopped_at + 5);
        assert_eq!(shop.bytes(&format!("stopped/{newest}")), shop.bytes(&format!("alone/{newest}")));
    }
}

/// A killed run: steps that no checkpoint holds are taken again, and a damaged checkpoint is passed over.
#[test]
fn a_killed_run_goes_on_from_its_newest_whole_checkpoint() {
    for device in devices() {
        let shop = Workshop::new();
        let set = ["lora.dropout=0.1", "train.keep_last=9", "train.eval_steps=3"];
        shop.train("alone", device, &set).succeeds();
        shop.train("killed", device, &set).succeeds();
        let damaged = shop.path("killed/checkpoints/step-000006/optimizer.safetensors");
        let bytes = fs::read(&damaged).unwrap();
        fs::write(&damaged, &bytes[..bytes.len() / 2]).unwrap();
        fs::remove_dir_all(shop.path("killed/checkpoints/step-000008")).unwrap();
        fs::remove_dir_all(shop.path("killed/adapter")).unwrap();

        let run = shop.resume("killed", device, &[]).succeeds();
        assert!(run.err.contains("passing over a damaged checkpoint"), "{}", run.err);
        assert!(run.err.contains("step 5/8") && !run.err.contains("step 4/8"), "{}", run.err);
        assert_eq!(shop.timeless_metrics("killed"), shop.timeless_metrics("alone"));
        assert_eq!(shop.adapter("killed"), shop.adapter("alone"));
        assert_eq!(shop.read("killed/samples.md"), shop.read("alone/samples.md"));
    }
}

#[test]
fn a_run_does_not_go_on_with_other_data() {
    let shop = Workshop::new();
    shop.train("run", "cpu", &[]).succeeds();
    let before = shop.snapshot();
    shop.resume("run", "cpu", &["data.max_seq_len=50"]).fails(&[
        "run: parts of this run have changed since this run began",
        "recipe: data.max_seq_len was 96, is 50",
        "--accept-changes",
    ]);
    assert_eq!(shop.snapshot(), before);

    let mut records = records();
    records[0].1 = "Something else.".to_owned();
    shop.write("data.json", json(&records));
    let before = shop.snapshot();
    shop.resume("run", "cpu", &[]).fails(&["data.json holds something else", "new run"]);
    assert_eq!(shop.snapshot(), before);
}

#[test]
fn a_folder_in_use_is_refused() {
    let shop = Workshop::new();
    shop.train("run", "cpu", &["train.max_steps=2"]).succeeds();
    let before = shop.snapshot();
    shop.train("run", "cpu", &[]).fails(&["run: holds a run already", "pronk train --resume", "run.dir"]);
    assert_eq!(shop.snapshot(), before);

    shop.resume("nowhere", "cpu", &[]).fails(&["nowhere", "No such file"]);
    fs::remove_dir_all(shop.path("run/checkpoints")).unwrap();
    shop.resume("run", "cpu", &[]).fails(&["no whole checkpoint", "another run.dir"]);
}

#[test]
fn the_recipe_itself_is_never_replaced() {
    let shop = Workshop::new();
    let before = shop.snapshot();
    shop.train(".", "cpu", &[]).fails(&["run.dir", "recipe.toml", "expected another folder"]);
    assert_eq!(shop.snapshot(), before);
}

#[test]
fn zero_switches_off() {
    let shop = Workshop::new();
    let off = ["train.eval_steps=0", "train.save_steps=0", "train.max_grad_norm=0"];
    let run = shop.train("off", "cpu", &off).succeeds();
    assert!(!run.out.contains("eval loss"), "{}", run.out);
    assert!(!shop.path("off/checkpoints").exists());
    assert!(shop.path("off/adapter/adapter_model.safetensors").exists());
    assert!(shop.metrics("off").iter().all(|line| line.get("eval_loss").is_none()));

    let run = shop.train("unheld", "cpu", &["data.val_size=0"]).succeeds();
    assert!(run.out.lines().any(|l| l.starts_with("rows held out") && l.ends_with(" 0")), "{}", run.out);
    assert_eq!(shop.metrics("unheld").len(), 8);
    let last = "unheld/checkpoints/step-000008/adapter_model.safetensors";
    assert_eq!(shop.adapter("unheld"), shop.bytes(last), "the last adapter is kept");

    // A bound that is never reached does what none does; a bound that is changes the run.
    shop.train("loose", "cpu", &["train.max_grad_norm=1e9"]).succeeds();
    shop.train("unbound", "cpu", &["train.max_grad_norm=0"]).succeeds();
    shop.train("tight", "cpu", &["train.max_grad_norm=1e-7"]).succeeds();
    assert_eq!(shop.adapter("loose"), shop.adapter("unbound"));
    assert_ne!(shop.adapter("tight"), shop.adapter("unbound"));
    let norm = |run| shop.metrics(run)[1]["grad_norm"].as_f64().unwrap();
    assert!(norm("tight") > 1e-3, "the norm before clipping is told");
}

#[test]
fn an_adapter_can_be_trained_on() {
    let shop = Workshop::new();
    let gqa = format!("lora.init_adapter={}", golden("adapter-gqa"));
    let set = [gqa.as_str(), "lora.alpha=8", "train.learning_rate=1e-9"];
    shop.train("on", "cpu", &set).succeeds();
    let theirs = fs::read(golden("adapter-gqa/adapter_model.safetensors")).unwrap();
    let ours = shop.adapter("on");
    let names = SafeTensors::deserialize(&theirs).unwrap().names().len();
    assert_eq!((names, SafeTensors::deserialize(&ours).unwrap().names().len()), (28, 28));
    let key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight";
    for (a, b) in tensor(&theirs, key).0.iter().zip(tensor(&ours, key).0) {
        assert!((a - b).abs() < 1e-6);
    }

    let before = shop.snapshot();
    shop.train("no", "cpu", &[&gqa, "lora.rank=8"]).fails(&[
        "lora.init_adapter",
        "has rank 4",
        "asks for rank 8",
    ]);
    shop.train("no", "cpu", &["lora.init_adapter=nowhere"]).fails(&["lora.init_adapter", "nowhere"]);
    assert_eq!(shop.snapshot(), before);
}

#[test]
fn rslora_scales_by_the_root_of_the_rank() {
    let shop = Workshop::new();
    // alpha / sqrt(rank) of one is alpha / rank of the other: 8 / 2 = 16 / 4.
    shop.train("rslora", "cpu", &["lora.rslora=true", "lora.alpha=8"]).succeeds();
    shop.train("plain", "cpu", &["lora.rslora=false", "lora.alpha=16"]).succeeds();
    assert_eq!(shop.losses("rslora"), shop.losses("plain"));
    assert_eq!(shop.adapter("rslora"), shop.adapter("plain"));
    assert!(shop.read("rslora/adapter/adapter_config.json").contains("\"use_rslora\": true"));
}

#[test]
fn targets_are_names_or_all_linear() {
    let shop = Workshop::new();
    let modules = |run: &str| SafeTensors::deserialize(&shop.adapter(run)).unwrap().names().len() / 2;
    shop.train("all", "cpu", &["lora.target_modules=all-linear", "train.max_steps=2"]).succeeds();
    assert_eq!(modules("all"), 14);
    shop.train("one", "cpu", &["lora.target_modules=['o_proj']", "train.max_steps=2"]).succeeds();
    assert_eq!(modules("one"), 2);

    let before = shop.snapshot();
    shop.train("none", "cpu", &["lora.target_modules=['q_proj', 'w_proj']"]).fails(&[
        "lora.target_modules",
        "w_proj",
        "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        "all-linear",
    ]);
    assert_eq!(shop.snapshot(), before);
}

#[test]
fn every_tiny_base_trains() {
    for device in devices() {
        for base in ["tiny-tied", "tiny-bias", "tiny-head-dim", "tiny-rope-linear", "tiny-rope-llama3"] {
            let shop = Workshop::new();
            shop.write("recipe.toml", recipe(base));
            shop.train("run", device, &["train.max_steps=2"]).succeeds();
            assert!(shop.losses("run").iter().all(|loss| loss.is_finite()), "{base}");
        }
    }
}

#[test]
fn a_loss_that_is_no_number_stops_the_run() {
    let shop = Workshop::new();
    let set = ["train.learning_rate=1e37", "train.warmup_steps=0", "train.save_steps=1", "data.val_size=0"];
    let run = shop.train("run", "cpu", &set).fails(&["step 2", "NaN", "train.learning_rate", "step-000001"]);
    assert!(run.err.contains("last good state"), "{}", run.err);
    assert_eq!(shop.losses("run").len(), 1);
    let kept = shop.bytes("run/checkpoints/step-000001/adapter_model.safetensors");
    assert!(SafeTensors::deserialize(&kept).is_ok());
    assert_eq!(shop.adapter("run"), kept);
}
