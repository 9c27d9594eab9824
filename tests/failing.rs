//! Runs that go wrong: what is kept of them, and that it is what they say.
#![allow(clippy::unwrap_used, clippy::expect_used)] // in a test, a panic is the report

mod support;

use std::fs;

use support::{Workshop, json, records};

#[test]
fn steps_that_are_no_numbers_are_left_out_and_counted() {
    let shop = Workshop::new();
    let set = ["train.learning_rate=1e37", "train.warmup_steps=0", "train.save_steps=1", "data.val_size=0"];
    let stopped = shop.train("stopped", "cpu", &set).fails(&["step 2", "not_finite.json", "train.on_nan"]);
    assert!(!stopped.err.contains("in a row"), "{}", stopped.err);

    let skip = [&set[..], &["train.on_nan=skip", "train.max_steps=30"]].concat();
    let run =
        shop.train("skipped", "cpu", &skip).fails(&["step 12", "after 10 steps in a row", "last good state"]);
    assert!(run.err.contains("step 2 is skipped"), "{}", run.err);
    let lines = shop.metrics("skipped");
    assert_eq!(lines.len(), 11);
    for (i, line) in lines.iter().enumerate().skip(1) {
        assert_eq!((&line["skipped"], &line["loss"]), (&i.into(), &serde_json::Value::Null));
    }
    let adapter = |step| shop.bytes(&format!("skipped/checkpoints/step-{step:06}/adapter_model.safetensors"));
    assert_eq!(adapter(10), adapter(11), "nothing was learned from them");
    let batch: serde_json::Value = serde_json::from_str(&shop.read("skipped/not_finite.json")).unwrap();
    assert_eq!((&batch["step"], batch["rows"].as_array().unwrap().len()), (&12.into(), 4));
    assert!(batch["rows"][0]["text"].as_str().unwrap().contains("### Response:"));

    // A run that goes on counts on.
    fs::remove_dir_all(shop.path("skipped/checkpoints/step-000011")).unwrap();
    shop.resume("skipped", "cpu", &[]).fails(&["step 12", "after 10 steps in a row"]);
    assert_eq!(shop.timeless_metrics("skipped").len(), lines.len());
}

/// What a message names is there afterwards, even where the very first step goes wrong.
#[test]
fn the_first_step_keeps_what_it_names() {
    let shop = Workshop::new();
    let base = shop.copy_base("tiny-gqa", "base");
    let mut weights = fs::read(base.join("model.safetensors")).unwrap();
    let end = weights.len() - 4;
    weights[end..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(base.join("model.safetensors"), weights).unwrap();
    let path = format!("base.path={}", base.display());
    let set = [&path[..], "train.eval_steps=0", "run.samples=0"];
    for (run, more) in [("stepped", None), ("rehearsed", Some("train.memory_budget=80MB"))] {
        let set: Vec<&str> = set.iter().copied().chain(more).collect();
        let told = shop.train(run, "cpu", &set).fails(&["step 1", "the loss is NaN", "train.on_nan"]).err;
        let batch: serde_json::Value =
            serde_json::from_str(&shop.read(&format!("{run}/not_finite.json"))).unwrap();
        assert!(batch["rows"][0]["text"].as_str().unwrap().contains("### Response:"), "{batch}");
        assert!(told.contains(&format!("{run}/not_finite.json")), "{told}");
        let kept = format!("{run}/checkpoints/step-000000");
        assert_eq!(told.contains(&kept), shop.path(&kept).exists(), "{told}");
    }
}

/// The steps that went well are kept, not only those up to the last checkpoint that was due.
#[test]
fn a_run_that_has_to_end_saves_what_went_well() {
    let shop = Workshop::new();
    // A base that has no number for one letter, which the third batch is the first to hold.
    let base = shop.copy_base("tiny-gqa", "base");
    let mut weights = fs::read(base.join("model.safetensors")).unwrap();
    let tokenizer: serde_json::Value =
        serde_json::from_slice(&fs::read(base.join("tokenizer.json")).unwrap()).unwrap();
    let id = tokenizer["model"]["vocab"]["Z"].as_u64().unwrap() as usize;
    let file = safetensors::SafeTensors::deserialize(&weights).unwrap();
    let embeddings = file.tensor("model.embed_tokens.weight").unwrap();
    let start = embeddings.data().as_ptr() as usize - weights.as_ptr() as usize;
    let row = 4 * embeddings.shape()[1];
    weights[start + id * row..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(base.join("model.safetensors"), weights).unwrap();
    let mut some = records();
    some[9].1 = "Z.".to_owned();
    shop.write("data.json", json(&some));
    let path = format!("base.path={}", base.display());
    let set = [&path, "data.order=sequential", "data.val_size=0", "train.save_steps=50", "train.keep_last=1"];
    let told = shop.train("run", "cpu", &set).fails(&["step 3: the loss is NaN", "train.on_nan"]).err;
    assert!(told.contains("run/checkpoints/step-000002"), "{told}");
    assert!(shop.path("run/checkpoints/step-000000").exists(), "none is removed for it");
    shop.pronk(["verify", "run"]).succeeds();
    let run = shop.resume_changed("run", "cpu", &["train.on_nan=skip"]).succeeds();
    assert!(run.err.contains("step 3 is skipped") && !run.err.contains("step 2/8"), "{}", run.err);

    // Where it was the adapter that burst, the state before is the last good one.
    let set = ["train.save_steps=4", "train.max_steps=4", "data.val_size=0", "train.keep_last=1"];
    shop.train("burst", "cpu", &set).succeeds();
    let set = ["train.learning_rate=1e37", "train.max_steps=20", "train.save_steps=50"];
    let told = shop.resume_changed("burst", "cpu", &set).fails(&["train.on_nan"]).err;
    assert!(told.contains("burst/checkpoints/step-000004"), "{told}");
    shop.pronk(["verify", "burst"]).succeeds();
    shop.resume_changed("burst", "cpu", &["train.learning_rate=1e-3", "train.max_steps=8"]).succeeds();

    // An update that no number holds is found when it is to be saved, even where the run would skip bad steps.
    let set = ["train.learning_rate=1e39", "train.warmup_steps=0", "train.save_steps=1", "train.on_nan=skip"];
    let told = shop.train("overflown", "cpu", &set).fails(&["the adapter is NaN", "train.learning_rate"]).err;
    assert!(told.contains("overflown/checkpoints/step-000000"), "{told}");
    assert!(shop.path("overflown/not_finite.json").exists());
}

/// The best adapter is written before the checkpoint that tells of it. A run that goes on otherwise from before that one does
/// not call it its own.
#[test]
fn the_best_adapter_is_that_of_its_step() {
    let shop = Workshop::new();
    let set = ["train.eval_steps=1", "train.save_steps=4", "run.samples=0", "train.learning_rate=1e-3"];
    shop.train("run", "cpu", &set).succeeds();
    fs::remove_dir_all(shop.path("run/checkpoints/step-000008")).unwrap();
    let abandoned = shop.adapter("run");
    let run = shop.resume_changed("run", "cpu", &["train.learning_rate=1e-12"]).succeeds();
    assert_ne!(shop.adapter("run"), abandoned, "{}", run.err);
    let best = run.out.split("at step ").nth(1).and_then(|rest| rest.split(|c: char| !c.is_numeric()).next());
    let best = best.unwrap();
    let card = shop.read("run/adapter/README.md");
    assert!(card.contains(&format!("| optimizer steps | {best} |")), "{}\n{card}", run.out);
    shop.pronk(["verify", "run"]).succeeds();
    fs::remove_dir_all(shop.path("run/adapter")).unwrap();
    shop.pronk(["verify", "run"]).fails(&["run/adapter"]);
}

/// What a change would have made is not there where the change is refused.
#[test]
fn a_change_that_is_refused_changes_nothing() {
    let shop = Workshop::new();
    shop.train("run", "cpu", &["train.max_steps=4"]).succeeds();
    let (before, data) = (shop.snapshot(), shop.bytes("data.json"));
    let mut other = records();
    other[0].1 = "Something else.".to_owned();
    shop.write("data.json", json(&other));
    let set = ["train.memory_budget=1KB", "train.max_steps=6"];
    shop.resume_changed("run", "cpu", &set).fails(&["train.memory_budget"]);
    shop.write("data.json", data);
    assert_eq!(shop.snapshot(), before);
    shop.resume("run", "cpu", &[]).succeeds();
}
