//! What a run survives: being killed at any moment, a disk that is full, somebody else in its folder, damaged files.
//! What it has saved is what it says.
#![allow(clippy::unwrap_used, clippy::expect_used)] // in a test, a panic is the report
#![cfg(unix)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use support::{Workshop, command, devices, hears_ctrl_c, json, records, sandboxed, train_args};

/// All that two runs of one recipe share, whenever they ended.
fn result(shop: &Workshop, run: &str) -> BTreeMap<String, Vec<u8>> {
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    for (path, bytes) in shop.snapshot() {
        let name = path.strip_prefix(shop.path(run)).map(|name| name.display().to_string());
        // The others name the run's folder, or the time.
        let Ok(name) = name else { continue };
        if name.starts_with("adapter/") || name.starts_with("checkpoints/") || name == "samples.md" {
            files.insert(name, bytes);
        }
    }
    let metrics = shop.timeless_metrics(run).iter().map(|line| format!("{line}\n")).collect::<String>();
    files.insert("metrics".into(), metrics.into_bytes());
    files
}

#[track_caller]
fn same_result(shop: &Workshop, run: &str, alone: &str) {
    let (found, expected) = (result(shop, run), result(shop, alone));
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, bytes) in found {
        assert!(bytes == expected[&name], "{run}/{name} is not that of {alone}");
    }
}

/// Begins or goes on with a run, as a script would that knows nothing of how it ended.
fn take_up(shop: &Workshop, run: &str, device: &str, set: &[&str]) -> Command {
    let mut command = command(shop.root());
    if shop.path(&format!("{run}/recipe.toml")).exists() {
        command.args(["train", "--resume", run, "--device", device]);
    } else {
        command.args(train_args(run, device, set));
    }
    command.stdout(Stdio::null());
    command
}

/// Waits for the line that says that `step` is done.
fn wait_for_step(child: &mut Child, step: u64) {
    let begin = format!("step {step}/");
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    lines.find(|line| line.as_ref().unwrap().starts_with(&begin)).expect("a step").unwrap();
    // What else it says is read, so that it never waits for a reader.
    std::thread::spawn(move || lines.for_each(drop));
}

const LONG: [&str; 2] = ["train.max_steps=100000", "train.schedule=constant"];

#[test]
fn killed_at_any_moment_it_is_the_same_run() {
    let mut moment: u64 = 20_261_124;
    for device in devices() {
        let shop = Workshop::new();
        let set =
            ["train.save_steps=1", "train.eval_steps=2", "lora.dropout=0.1", "train.optimizer=adamw8bit"];
        let started = Instant::now();
        shop.train("alone", device, &set).succeeds();
        let whole = started.elapsed();
        for kill in 0..6 {
            let mut child = take_up(&shop, "killed", device, &set).stderr(Stdio::null()).spawn().unwrap();
            moment = moment.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            std::thread::sleep(whole.mul_f64((moment >> 40) as f64 / f64::from(1 << 24)));
            child.kill().unwrap(); // SIGKILL
            child.wait().unwrap();
            if shop.path("killed/recipe.toml").exists() {
                let verified = shop.pronk(["verify", "killed"]);
                assert_eq!(verified.code, Some(0), "kill {kill}: {verified:#?}");
            }
        }
        let status = take_up(&shop, "killed", device, &set).stderr(Stdio::null()).status().unwrap();
        assert!(status.success());
        same_result(&shop, "killed", "alone");
        shop.pronk(["verify", "killed"]).succeeds();
    }
}

/// What training starts from lies in the checkpoints, beside what it has come to.
#[test]
fn every_start_goes_on_to_the_bit() {
    for device in devices() {
        let shop = Workshop::new();
        let nf4 = "base.quantize=nf4";
        let starts: [(&str, &[&str]); 6] = [
            ("gaussian", &[]),
            ("pissa", &["lora.rslora=true", "lora.rank=3"]),
            ("pissa_niter_2", &[nf4, "base.weights=streamed", "lora.target_modules=all-linear"]),
            ("loftq", &[nf4, "lora.target_modules=all-linear"]),
            ("loftq", &["base.quantize=int8", "lora.use_dora=true"]),
            ("default", &[nf4, "lora.restore_rank=24", "lora.target_modules=all-linear"]),
        ];
        for (number, (init, more)) in starts.into_iter().enumerate() {
            let init = format!("lora.init_lora_weights={init}");
            let set = [more, &["lora.dropout=0.1", init.as_str()]].concat();
            let (alone, stopped) = (format!("alone{number}"), format!("stopped{number}"));
            shop.train(&alone, device, &set).succeeds();
            shop.train(&stopped, device, &set).succeeds();
            for path in ["checkpoints/step-000008", "adapter"] {
                fs::remove_dir_all(shop.path(&format!("{stopped}/{path}"))).unwrap();
            }
            shop.resume(&stopped, device, &[]).succeeds();
            assert_eq!(shop.timeless_metrics(&stopped), shop.timeless_metrics(&alone), "{init}");
            let newest =
                ["adapter_model", "optimizer"].map(|n| format!("checkpoints/step-000008/{n}.safetensors"));
            for file in newest {
                let of = |run: &str| shop.bytes(&format!("{run}/{file}"));
                assert!(of(&stopped) == of(&alone), "{init}: {file}");
            }
        }
    }
}

/// What it makes up for is the loss of one quantized base.
#[test]
fn what_restores_goes_on_over_the_base_that_it_restores() {
    let shop = Workshop::new();
    shop.train("run", "cpu", &["base.quantize=nf4", "lora.restore_rank=4"]).succeeds();
    for changed in ["base.quantize=int8", "base.skip_modules=['v_proj']"] {
        let run = shop.resume_changed("run", "cpu", &[changed, "train.max_steps=12"]);
        run.fails(&[
            "makes up for what its base lost",
            "quantized to 4 bits",
            "base.skip_modules as they were",
        ]);
    }
    shop.resume_changed("run", "cpu", &["train.max_steps=12"]).succeeds();
}

/// A run is of itself once it has begun.
#[test]
fn the_adapter_that_it_started_from_may_go() {
    let shop = Workshop::new();
    shop.train("first", "cpu", &[]).succeeds();
    let set = ["lora.init_adapter=first/adapter"];
    shop.train("alone", "cpu", &set).succeeds();
    shop.train("stopped", "cpu", &set).succeeds();
    for path in ["first", "stopped/checkpoints/step-000008", "stopped/adapter"] {
        fs::remove_dir_all(shop.path(path)).unwrap();
    }
    shop.resume("stopped", "cpu", &[]).succeeds();
    same_result(&shop, "stopped", "alone");
}

/// The moments that a random kill seldom meets.
#[test]
fn it_begins_anew_where_there_was_nothing_to_go_on_from() {
    let shop = Workshop::new();
    let set = ["train.keep_last=9"];
    shop.train("alone", "cpu", &set).succeeds();

    // Before anything was loaded.
    let recipe = shop.read("alone/recipe.toml");
    shop.write("early/recipe.toml", &recipe);
    shop.resume("early", "cpu", &[]).succeeds();
    same_result(&shop, "early", "alone");

    // While the first checkpoint was written.
    shop.write("first/recipe.toml", &recipe);
    shop.write("first/checkpoints/.step-000000.partial/adapter_config.json", "{");
    shop.write("first/.recipe.toml.Ab3dEf", "half");
    let run = shop.resume("first", "cpu", &[]).succeeds();
    assert!(run.err.contains("ended before its first checkpoint"), "{}", run.err);
    same_result(&shop, "first", "alone");
    assert!(!shop.path("first/.recipe.toml.Ab3dEf").exists());

    // Behind the first checkpoint: the base's own loss is measured, and logged, once more.
    shop.train("before", "cpu", &set).succeeds();
    for step in ["2", "4", "6", "8"] {
        fs::remove_dir_all(shop.path(&format!("before/checkpoints/step-00000{step}"))).unwrap();
    }
    let log = shop.read("before/metrics.jsonl");
    shop.write("before/metrics.jsonl", log.lines().next().unwrap().to_owned() + "\n{\"step\":1,\"lo");
    shop.resume("before", "cpu", &[]).succeeds();
    same_result(&shop, "before", "alone");

    // After the last step, before the last adapter and the last samples.
    shop.train("late", "cpu", &set).succeeds();
    let samples = shop.read("late/samples.md");
    shop.write("late/samples.md", samples.replace("after step 8", "after step 7"));
    shop.resume("late", "cpu", &[]).succeeds();
    same_result(&shop, "late", "alone");
}

#[test]
fn a_second_process_is_refused_and_a_dead_one_holds_nothing() {
    let shop = Workshop::new();
    let mut first = take_up(&shop, "run", "cpu", &LONG).stderr(Stdio::piped()).spawn().unwrap();
    wait_for_step(&mut first, 2);
    shop.resume("run", "cpu", &[]).fails(&["run: another process is at work in this run's folder"]);
    shop.train("run", "cpu", &[]).fails(&["holds a run already"]);
    first.kill().unwrap();
    first.wait().unwrap();
    let steps = format!("train.max_steps={}", shop.losses_so_far("run") + 1);
    shop.resume_changed("run", "cpu", &[&steps]).succeeds();
}

#[test]
fn signals_save_first() {
    for signals in [&["TERM"][..], &["HUP"], &["USR1", "TERM"]] {
        let shop = Workshop::new();
        let mut child = take_up(&shop, "run", "cpu", &LONG).stderr(Stdio::piped()).spawn().unwrap();
        wait_for_step(&mut child, 2);
        for signal in signals {
            let kill = Command::new("sh").args(["-c", &format!("kill -{signal} {}", child.id())]).status();
            assert!(kill.unwrap().success());
        }
        assert_eq!(child.wait().unwrap().code(), Some(130), "{signals:?}");
        let newest = format!("run/checkpoints/step-{:06}", shop.losses("run").len());
        assert!(shop.path(&newest).is_dir(), "{signals:?}: {newest}");
    }
}

/// A run that is stopped while it measures does not measure to the end first. Going on it does, and is the run that was never
/// stopped.
#[test]
fn a_stop_does_not_wait_for_a_measurement() {
    let shop = Workshop::new();
    let many: Vec<_> = (0..40).flat_map(|_| records()).collect();
    shop.write("data.json", json(&many));
    let fixed = ["data.val_size=470", "train.eval_steps=1", "train.save_steps=1", "run.samples=0"];
    let set = [&fixed[..], &["train.schedule=constant", "train.max_steps=100000"]].concat();
    let left_off = |run: &str| {
        let mut child = command(shop.root())
            .args(train_args(run, "cpu", &set))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        wait_for_step(&mut child, 2);
        std::thread::sleep(Duration::from_millis(60));
        let kill = Command::new("sh").args(["-c", &format!("kill -TERM {}", child.id())]).status();
        assert!(kill.unwrap().success());
        assert_eq!(child.wait().unwrap().code(), Some(130));
        let newest = format!("{run}/checkpoints/step-{:06}/trainer_state.json", shop.losses(run).len());
        let state: serde_json::Value = serde_json::from_str(&shop.read(&newest)).unwrap();
        !state["unmeasured"].is_null()
    };
    // Of a step and its measurement the latter takes nearly all the time.
    let run = (0..50).map(|trial| format!("run-{trial}")).find(|run| left_off(run)).unwrap();
    let steps = format!("train.max_steps={}", shop.losses(&run).len() + 2);
    shop.resume_changed(&run, "cpu", &[&steps]).succeeds();
    let alone = [&fixed[..], &["train.schedule=constant", &steps]].concat();
    shop.train("alone", "cpu", &alone).succeeds();
    assert_eq!(shop.timeless_metrics(&run), shop.timeless_metrics("alone"));
    same_result(&shop, &run, "alone");
}

/// Half a model does not stay on the disk, in a folder that nobody sees.
#[test]
fn what_a_signal_ends_leaves_nothing() {
    let shop = Workshop::new();
    let before = shop.snapshot();
    for signal in ["INT", "TERM", "HUP"] {
        if signal == "INT" && !hears_ctrl_c() {
            continue;
        }
        let mut child = sandboxed(Command::new(env!("CARGO_BIN_EXE_pronk")), shop.root())
            .args(["synth", "--like", "llama-2-7b", "--out", "models/7b"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let waiting = Instant::now();
        let entries =
            |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
        let has_weights =
            |dir: PathBuf| entries(&dir).any(|file| file.extension() == Some("safetensors".as_ref()));
        while !entries(&shop.path("models")).any(has_weights) {
            assert!(waiting.elapsed() < Duration::from_mins(1), "no weights yet");
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(!shop.path("models/7b").exists());
        let kill = Command::new("sh").args(["-c", &format!("kill -{signal} {}", child.id())]).status();
        assert!(kill.unwrap().success());
        assert_eq!(child.wait().unwrap().code(), Some(130), "{signal}");
        assert!(!shop.path("models").exists(), "{signal}");
        assert_eq!(shop.snapshot(), before, "{signal}");
    }
}

/// What `nohup` starts does not end with its terminal.
#[test]
fn an_ignored_hangup_stays_ignored() {
    let shop = Workshop::new();
    let args = train_args("run", "cpu", &LONG).join(" ");
    let script = format!("trap '' HUP; exec {} {args}", env!("CARGO_BIN_EXE_pronk"));
    let mut child = sandboxed(Command::new("sh"), shop.root())
        .args(["-c", &script])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for_step(&mut child, 2);
    let kill = |signal: &str| {
        let status = Command::new("sh").args(["-c", &format!("kill -{signal} {}", child.id())]).status();
        assert!(status.unwrap().success());
    };
    kill("HUP");
    let at = shop.losses_so_far("run");
    let waiting = Instant::now();
    while shop.losses_so_far("run") < at + 3 {
        assert!(waiting.elapsed() < Duration::from_mins(1), "no step after SIGHUP");
        std::thread::sleep(Duration::from_millis(20));
    }
    kill("TERM");
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

/// A file that may grow no further stands for a disk that is full: training pauses, says so, tries again, ends; and
/// goes on where it was.
#[test]
fn a_save_that_fails_pauses_and_then_ends_the_run() {
    let shop = Workshop::new();
    let set =
        ["train.max_steps=150", "train.save_steps=10", "lora.rank=1", "train.eval_steps=0", "run.samples=0"];
    shop.train("alone", "cpu", &[&set[..], &["train.save_patience=2"]].concat()).succeeds();
    let largest = ["checkpoints/step-000150/optimizer.safetensors", "prepared.safetensors", "lock.json"]
        .map(|name| shop.bytes(&format!("alone/{name}")).len());
    let kilobytes = largest.into_iter().max().unwrap().div_ceil(1024) + 1;
    let log = shop.bytes("alone/metrics.jsonl").len();
    assert!(
        log > 1024 * kilobytes,
        "the log has to outgrow {kilobytes} kB to meet the limit; it has {log} bytes"
    );

    let args = train_args("run", "cpu", &[&set[..], &["train.save_patience=2"]].concat()).join(" ");
    let script = format!("trap '' XFSZ; ulimit -f {kilobytes}; exec {} {args}", env!("CARGO_BIN_EXE_pronk"));
    let run: support::Run =
        sandboxed(Command::new("bash"), shop.root()).args(["-c", &script]).output().unwrap().into();
    let run =
        run.fails(&["cannot be saved", "metrics.jsonl", "last good state", "pronk train --resume", "run"]);
    assert!(run.err.contains("paused after step") && run.err.contains("trying again in 1 s"), "{}", run.err);
    shop.pronk(["verify", "run"]).succeeds();
    shop.resume("run", "cpu", &[]).succeeds();
    same_result(&shop, "run", "alone");
}

#[test]
fn flipped_bits_are_found_and_named() {
    let shop = Workshop::new();
    shop.train("run", "cpu", &["train.keep_best=1"]).succeeds();
    let out = shop.pronk(["verify", "run"]).succeeds().out;
    assert!(out.contains("run/adapter") && out.contains("run/checkpoints/step-000008"), "{out}");
    shop.pronk(["verify", "run/adapter"]).succeeds();
    let files: Vec<PathBuf> =
        shop.snapshot().into_iter().filter(|(_, bytes)| !bytes.is_empty()).map(|(path, _)| path).collect();
    let files = files.iter().filter(|path| path.starts_with(shop.path("run")));
    for (i, path) in files.enumerate() {
        let whole = fs::read(path).unwrap();
        let mut flipped = whole.clone();
        flipped[(i * 7919) % whole.len()] ^= 1 << (i % 8);
        fs::write(path, flipped).unwrap();
        let name = path.strip_prefix(shop.root()).unwrap().display().to_string();
        shop.pronk(["verify", "run"]).fails(&["1 of these are not what was written", &name]);
        fs::write(path, whole).unwrap();
    }
    shop.pronk(["verify", "run"]).succeeds();
    fs::remove_file(shop.path("run/adapter/README.md")).unwrap();
    shop.pronk(["verify", "run"]).fails(&["run/adapter/README.md"]);
    shop.pronk(["verify", "data.json"]).fails(&["data.json: expected a run's folder"]);
    shop.pronk(["verify", &support::golden("adapter-gqa")]).fails(&["manifest.json"]);
}

#[test]
fn what_a_run_is_made_of_is_written_down() {
    let shop = Workshop::new();
    shop.train("run", "cpu", &["train.save_steps=4"]).succeeds();
    let lock: serde_json::Value = serde_json::from_str(&shop.read("run/lock.json")).unwrap();
    assert_eq!(lock["recipe"]["knobs"]["train"]["max_steps"], 8);
    assert_eq!(lock["sessions"][0]["device"], "cpu");
    assert!(lock["data"][0]["path"].as_str().unwrap().ends_with("data.json"));

    // A copy of the base is the base; other weights are not.
    let mut other = records();
    other[0].1 = "Something else.".to_owned();
    shop.write("data.json", json(&other));
    let set = ["train.max_steps=10"];
    shop.resume("run", "cpu", &set)
        .fails(&["data.json holds something else", "train.max_steps was 8, is 10"]);
    let run = shop.resume_changed("run", "cpu", &set).succeeds();
    assert!(run.out.contains("finished 10 steps"), "{}", run.out);
    assert!(shop.read("run/recipe.toml").contains("max_steps = 10"), "a change is saved with the run");
    shop.resume("run", "cpu", &[]).succeeds();
    shop.pronk(["verify", "run"]).succeeds();

    let page = shop.pronk(["inspect", "run", "run"]).succeeds().out;
    for words in [
        "max_steps = 10",
        "tiny-gqa",
        "data.json",
        "began, pronk",
        "went on after step 8, pronk",
        "went on after step 10, pronk",
        "accepted: recipe: train.max_steps was 8, is 10",
        "loss of 10 steps",
        "lowest eval loss",
    ] {
        assert!(page.contains(words), "{words} is not in:\n{page}");
    }
    shop.pronk(["inspect", "run", "nowhere"]).fails(&["nowhere/recipe.toml"]);
}

#[test]
fn another_base_is_refused() {
    let shop = Workshop::new();
    let base = shop.copy_base("tiny-gqa", "base");
    let path = format!("base.path={}", base.display());
    shop.train("run", "cpu", &[&path]).succeeds();
    let weights = base.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&weights, bytes).unwrap();
    shop.resume("run", "cpu", &[]).fails(&["have changed since this run began", "base: ", "is another"]);
    shop.resume_changed("run", "cpu", &[]).succeeds();
}

#[test]
fn the_best_checkpoints_are_kept() {
    let shop = Workshop::new();
    let set = ["train.keep_last=1", "train.keep_best=2", "train.eval_steps=2", "train.max_steps=12"];
    shop.train("run", "cpu", &set).succeeds();
    let mut evals: Vec<(f64, u64)> = shop.metrics("run")[1..]
        .iter()
        .filter_map(|line| Some((line["eval_loss"].as_f64()?, line["step"].as_u64()?)))
        .collect();
    evals.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut expected: Vec<String> =
        evals[..2].iter().map(|(_, step)| *step).chain([12]).map(|step| format!("step-{step:06}")).collect();
    expected.sort();
    expected.dedup();
    assert_eq!(names(&shop.path("run/checkpoints")), expected);
}

fn names(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}
