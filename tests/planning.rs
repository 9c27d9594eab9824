//! `pronk plan`, as its user runs it: what it foretells, and that it reads no weights for it.
#![allow(clippy::unwrap_used, clippy::expect_used)] // in a test, a panic is the report

mod support;

use support::Workshop;

/// The numbers behind a line's words.
fn number(table: &str, line: &str) -> f64 {
    let found = table.lines().find_map(|l| l.strip_prefix(line)).unwrap_or_else(|| panic!("{line}: {table}"));
    found.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn the_parts_add_up_and_time_has_a_price() {
    let shop = Workshop::new();
    let run = shop.pronk(["plan", "recipe.toml", "--price", "2.5"]).succeeds();
    for line in ["weights", "adapter", "saved block inputs", "kept graphs", "or: logits", "the program"] {
        assert!(number(&run.out, line) >= 0.0);
    }
    assert!(number(&run.out, "peak") >= number(&run.out, "the program"));
    assert!(number(&run.out, "tokens a second, expected here") > 0.0);
    assert!((number(&run.out, "steps") - 8.0).abs() < 1e-9);
    assert!(run.out.contains("dollars") && run.out.contains("largest micro-batch that fits"), "{}", run.out);
    assert!(!shop.path("run").exists(), "a plan leaves nothing behind");
}

#[test]
fn a_card_has_its_own_memory() {
    let plan = ["plan", "recipe.toml", "--gpu", "RTX4090", "--price", "0.5"];
    let run = Workshop::new().pronk(plan).succeeds();
    assert!((number(&run.out, "the memory of the rtx4090") - 24.0).abs() < 1e-9, "{}", run.out);
    assert!(number(&run.out, "tokens a second, estimated") > 1e5, "{}", run.out);
    assert!(run.out.contains("dollars") && run.out.contains("40 % of the 165.2 TFLOP/s"), "{}", run.out);
}

#[test]
fn sizes_left_out_follow_the_memory() {
    let shop = Workshop::new();
    let text =
        shop.read("recipe.toml").replace("max_seq_len = 96\n", "").replace("micro_batch_size = 2\n", "");
    shop.write("recipe.toml", text);
    let plan = |budget: &str| {
        let set = format!("train.memory_budget={budget}");
        shop.pronk(["plan", "recipe.toml", "--set", &set, "--set", "train.recompute=none"])
    };
    let roomy = plan("8GB").succeeds();
    assert!(roomy.out.contains("train.micro_batch_size = 4: the whole batch"), "{}", roomy.out);
    assert!(roomy.out.contains(": the longest record"), "{}", roomy.out);
    let none = plan("1MB").fails(&["do not fit in train.memory_budget"]);
    for line in ["train.recompute = \"blocks\"", "train.saved_inputs = \"bf16\""] {
        assert!(none.out.contains(line), "{line}: {}", none.out);
    }
}
