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
    let run = Workshop::new().pronk(["plan", "recipe.toml", "--gpu", "RTX4090"]).succeeds();
    assert!((number(&run.out, "the memory of the rtx4090") - 24.0).abs() < 1e-9, "{}", run.out);
    assert!(!run.out.contains("hours"), "time is told for this machine alone: {}", run.out);
}
