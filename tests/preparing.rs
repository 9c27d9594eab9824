//! `pronk prep` and `pronk inspect data`, as their user runs them.
#![allow(clippy::unwrap_used, clippy::expect_used)] // in a test, a panic is the report

mod support;

use std::fs;

use support::{Workshop, golden, json, prompt, records};

/// `pronk prep` of `data` for the tiny base, in the folder of `shop`.
fn prep(shop: &Workshop, data: &[&str], out: &str, more: &[&str]) -> support::Run {
    let base = golden("tiny-gqa");
    let fixed = ["--base", &base, "--out", out];
    shop.pronk(["prep", "--data"].iter().chain(data).chain(&fixed).chain(more))
}

/// The number that the summary gives for `name`.
#[track_caller]
fn summed(table: &str, name: &str) -> usize {
    let line = table.lines().find(|line| line.starts_with(&format!("{name}  "))).unwrap_or_else(|| {
        panic!("no line for {name:?} in:\n{table}");
    });
    line.split_whitespace().last().unwrap().parse().unwrap()
}

/// A row as `inspect data` shows it: every line's role, and the ids.
fn row(shop: &Workshop, file: &str, row: &str) -> (Vec<String>, Vec<u32>) {
    let run = shop.pronk(["inspect", "data", file, "--row", row]).succeeds();
    let mut roles = Vec::new();
    let mut ids = Vec::new();
    for line in run.out.lines().skip(1) {
        let mut words = line.split_whitespace();
        roles.push(words.next().unwrap().to_owned());
        ids.push(words.next().unwrap().parse().unwrap());
    }
    (roles, ids)
}

#[test]
fn arrays_and_lines_give_the_same_rows() {
    let shop = Workshop::new();
    let lines: String = records()
        .iter()
        .map(|(i, o)| serde_json::json!({"output": o, "instruction": i, "input": null}).to_string() + "\n\n")
        .collect();
    shop.write("data.jsonl", "\u{feff}".to_owned() + &lines);
    let array = prep(&shop, &["data.json"], "a", &[]).succeeds();
    let lines = prep(&shop, &["data.jsonl"], "b", &[]).succeeds();
    assert_eq!(array.out.replace("wrote a", ""), lines.out.replace("wrote b", "").replace("jsonl", "json"));
    for k in ["0", "5", "11"] {
        assert_eq!(row(&shop, "a", k), row(&shop, "b", k));
    }
    let both = prep(&shop, &["data.json", "data.jsonl"], "c", &[]).succeeds();
    assert_eq!((summed(&both.out, "records"), summed(&both.out, "duplicates")), (24, 12));
    assert_eq!(row(&shop, "c", "12"), row(&shop, "a", "0"), "files come in the order given");
}

#[test]
fn the_summary_counts_what_there_is() {
    let shop = Workshop::new();
    let data = r#"[
        {"instruction": "One?", "input": "", "output": "Two.", "id": 1, "source": "x"},
        {"instruction": "One?", "output": "Two."},
        {"instruction": "Speak.", "output": ""},
        {"instruction": "Be long.", "output": "0123456789012345678901234567890123456789012345678901234567890"},
        {"instruction": "A question that is far too long to leave any room for an answer to it", "output": "."}
    ]"#;
    shop.write("d.json", data);
    let more = ["--template", "alpaca-short", "--max-seq-len", "80", "--val-size", "1"];
    let run = prep(&shop, &["d.json"], "out", &more).succeeds();
    let table = &run.out;
    let text = |i: &str, o: &str| prompt(i).len() + o.len() + 2; // <s> and </s>
    let expected = [
        ("records", 5),
        ("rows to train on", 3),
        ("rows held out", 1),
        ("tokens", 2 * text("One?", "Two.") + text("Speak.", "") + 80),
        ("supervised tokens", 5 + 5 + 1 + (80 - 1 - prompt("Be long.").len())),
        ("longest row", 80),
        ("truncated", 1),
        ("bad records skipped", 0),
        ("duplicates", 1),
        ("empty outputs", 1),
        ("ignored field 'id'", 1),
        ("ignored field 'source'", 1),
    ];
    for (name, count) in expected {
        assert_eq!(summed(table, name), count, "{name}:\n{table}");
    }
    assert!(table.contains("dropped: answer cut away by max_seq_len"), "{table}");
    assert!(table.contains("up to    64 tokens") && table.contains('█'), "{table}");
    // A prepared file sums itself up again, and is not let pass as it is.
    let again = shop.pronk(["inspect", "data", "out"]).fails(&[
        "answers-cut-away: 2 of 5, row ",
        "expected at most 1 %",
        "empty-outputs: 1 of 5, row ",
        "expected none",
        "To accept it: --allow empty-outputs",
    ]);
    assert!(again.out.starts_with(table.strip_suffix("wrote out\n").unwrap()), "{}", again.out);
    assert!(again.out.contains("d.json: record 5: dropped, answer cut away"), "{}", again.out);
    let allow = |checks: &[&str]| {
        let allowed = checks.iter().flat_map(|check| ["--allow", check]);
        shop.pronk(["inspect", "data", "out"].into_iter().chain(allowed))
    };
    let one = allow(&["empty-outputs"]).fails(&["out: 1 of 9 checks failed\n", "answers-cut-away"]);
    assert!(one.out.contains("empty-outputs       allowed   1 of 5 (20.00 %)"), "{}", one.out);
    allow(&["empty-outputs", "answers-cut-away"]).succeeds();
    allow(&["empty-output"]).fails(&["empty-output", "unknown variant"]);
}

#[test]
fn duplicates_are_not_on_both_sides() {
    let shop = Workshop::new();
    let twice = [records(), records()].concat();
    shop.write("twice.json", json(&twice));
    prep(&shop, &["twice.json"], "out", &["--val-size", "6", "--template", "alpaca-short"]).succeeds();
    let ids: Vec<Vec<u32>> = (0..24).map(|k| row(&shop, "out", &k.to_string()).1).collect();
    assert!(ids[18..].iter().all(|held_out| !ids[..18].contains(held_out)));
    let run = prep(&shop, &["twice.json"], "out", &["--val-size", "1"]);
    run.fails(&["val_size = 1: every row has more exact duplicates"]);
}

#[test]
fn held_out_rows_are_the_same_at_every_call() {
    let shop = Workshop::new();
    prep(&shop, &["data.json"], "a", &["--val-size", "4"]).succeeds();
    prep(&shop, &["data.json"], "b", &["--val-size", "4"]).succeeds();
    assert_eq!(shop.bytes("a"), shop.bytes("b"));
    let last = shop.pronk(["inspect", "data", "a", "--row", "11"]).succeeds();
    assert!(last.out.starts_with("row 11, held out"), "{}", last.out);
    let first = shop.pronk(["inspect", "data", "a", "--row", "7"]).succeeds();
    assert!(!first.out.contains("held out"), "{}", first.out);
    shop.pronk(["inspect", "data", "a", "--row", "12"]).fails(&["--row 12", "12 rows, counted from 0"]);
}

#[test]
fn a_row_shows_its_exact_tokens() {
    let shop = Workshop::new();
    let (i, o) = &records()[0];
    for (flags, masked) in [(&[][..], true), (&["--train-on-inputs"], false)] {
        prep(&shop, &["data.json"], "out", &[&["--template", "alpaca-short"], flags].concat()).succeeds();
        let shown = shop.pronk(["inspect", "data", "out", "--row", "0"]).succeeds().out;
        assert!(!shown.contains('\u{1b}'), "no colours where nobody sees them");
        let learned = if masked { o.len() + 1 } else { prompt(i).len() + o.len() + 1 };
        let length = prompt(i).len() + o.len() + 2;
        assert!(shown.starts_with(&format!("row 0: {length} tokens, {learned} learned\n")), "{shown}");
        let (roles, ids) = row(&shop, "out", "0");
        assert_eq!((ids.len(), ids[0], ids[length - 1]), (length, 1, 2));
        assert_eq!(ids.iter().filter(|&&id| id == 1).count(), 1, "one <s>");
        assert_eq!(roles.iter().filter(|role| *role == "response").count(), learned);
        assert!(roles[length - learned..].iter().all(|role| role == "response"));
        let lines: Vec<&str> = shown.lines().collect();
        assert!(lines[1].contains("<s>") && lines[1].ends_with("BOS"), "{}", lines[1]);
        assert!(lines[length].contains("</s>") && lines[length].ends_with("EOS"), "{}", lines[length]);
    }
}

/// Every format and every packing gives the rows that Alpaca's own gives.
#[test]
fn formats_are_found_and_said() {
    use serde_json::json;
    let shop = Workshop::new();
    prep(&shop, &["data.json"], "plain", &[]).succeeds();
    let rows = records();
    let of = |record: &dyn Fn(&str, &str) -> serde_json::Value| {
        rows.iter().map(|(i, o)| record(i, o).to_string() + "\n").collect::<String>()
    };
    let table: String = rows.iter().map(|(i, o)| format!("\"{i}\",\"{o}\"\n")).collect();
    let message = |author: &str, by: &str, what: &str, text: &str| json!({by: author, what: text});
    let files = [
        ("d.csv", format!("instruction,output\n{table}"), "Alpaca"),
        (
            "messages.jsonl",
            of(
                &|i, o| json!({"messages": [message("user", "role", "content", i), message("assistant", "role", "content", o)]}),
            ),
            "messages",
        ),
        (
            "sharegpt.jsonl",
            of(
                &|i, o| json!({"conversations": [message("human", "from", "value", i), message("gpt", "from", "value", o)]}),
            ),
            "ShareGPT",
        ),
    ];
    for (name, content, format) in files {
        shop.write(name, content);
        let run = prep(&shop, &[name], "out", &[]).succeeds();
        assert!(run.out.starts_with(&format!("{name}: {format}, 12 records\n")), "{}", run.out);
        for k in ["0", "11"] {
            assert_eq!(row(&shop, "out", k), row(&shop, "plain", k), "{name}");
        }
    }
    // Fields of other names; and text that no template is put around.
    shop.write("q.jsonl", of(&|i, o| json!({"question": i, "answer": o})));
    let named = ["--column", "instruction=question", "--column", "output=answer"];
    prep(&shop, &["q.jsonl"], "out", &named).succeeds();
    assert_eq!(row(&shop, "out", "0"), row(&shop, "plain", "0"));
    shop.write("p.jsonl", of(&|i, o| json!({"prompt": prompt(i), "completion": o})));
    prep(&shop, &["data.json"], "short", &["--template", "alpaca-short"]).succeeds();
    prep(&shop, &["p.jsonl"], "out", &[]).succeeds();
    assert_eq!(row(&shop, "out", "3"), row(&shop, "short", "3"));
    shop.write("t.jsonl", of(&|i, o| json!({"text": format!("{i} {o}")})));
    prep(&shop, &["t.jsonl"], "out", &[]).succeeds();
    let (roles, ids) = row(&shop, "out", "0");
    assert_eq!(ids.len(), rows[0].0.len() + rows[0].1.len() + 3);
    assert!(
        roles[0] == "prompt" && roles[1..].iter().all(|role| role == "response"),
        "all but <s> is learned"
    );
}

const CHATML: &str = "{% for m in messages %}{{ '[' + m.role + ']' + m.content + eos_token }}{% endfor %}\
                      {% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}";

#[test]
fn conversations_by_the_bases_own_template() {
    let shop = Workshop::new();
    let talk = r#"{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}"#;
    shop.write("talk.json", format!("[{talk}]"));
    let base = shop.copy_base("tiny-gqa", "base");
    let run = |more: &[&str]| {
        let fixed = ["prep", "--data", "talk.json", "--base", "base", "--template", "chat", "--out", "out"];
        shop.pronk(fixed.iter().chain(more))
    };
    run(&[]).fails(&["template chat: the base has no chat template", "chat_template.jinja"]);
    fs::write(base.join("chat_template.jinja"), CHATML).unwrap();
    let learned = |more: &[&str]| {
        run(more).succeeds();
        let (roles, ids) = row(&shop, "out", "0");
        let learned = roles.iter().zip(&ids).filter(|(role, _)| *role == "response").map(|(_, id)| *id);
        (ids.clone(), learned.collect::<Vec<_>>())
    };
    let text = "[system]S</s>[user]a</s>[assistant]b</s>[user]c</s>[assistant]d";
    shop.write("text.json", serde_json::json!([{"text": text}, {"text": "bd"}]).to_string());
    prep(&shop, &["text.json"], "text", &[]).succeeds();
    let (expected, answers) = (row(&shop, "text", "0").1[1..].to_vec(), row(&shop, "text", "1").1);
    let (b, d) = (answers[1], answers[2]);
    assert_eq!(learned(&[]), (expected.clone(), vec![b, 2, d, 2]), "<s> is the template's to write");
    assert_eq!(learned(&["--learn", "last"]), (expected, vec![d, 2]));
    let refused = run(&["--learn", "some"]).fails(&["--learn", "expected `all` or `last`"]);
    assert!(!refused.err.contains("panicked"));
}

#[test]
fn bad_records_are_listed_or_skipped() {
    let shop = Workshop::new();
    let mut lines = String::new();
    for n in 0..30 {
        lines += &format!("{{\"instruction\": \"{n}\", \"output\": {n}}}\n");
    }
    lines += "{\"instruction\": \"good\", \"output\": \"good\"}\n{\"instruction\"\n\"text\"\n";
    shop.write("d.jsonl", lines);
    let before = shop.snapshot();
    let run = prep(&shop, &["data.json", "d.jsonl"], "out", &[]);
    let run = run.fails(&[
        "32 of 45 records",
        "d.jsonl: record 1 (line 1): `output` is a number, expected a string",
        "d.jsonl: record 20 (line 20)",
        "... and 12 more",
        "--skip-bad",
    ]);
    assert!(!run.err.contains("record 21 "), "{}", run.err);
    assert_eq!(shop.snapshot(), before);

    let run = prep(&shop, &["data.json", "d.jsonl"], "out", &["--skip-bad"]).succeeds();
    assert_eq!((summed(&run.out, "bad records skipped"), summed(&run.out, "rows to train on")), (32, 13));
}

#[test]
fn templates_may_be_the_users_own() {
    let shop = Workshop::new();
    shop.write("t.jinja", "Q: {{ instruction }}\nA: {{ output }}");
    prep(&shop, &["data.json"], "out", &["--template", "t.jinja"]).succeeds();
    let (i, o) = &records()[0];
    assert_eq!(row(&shop, "out", "0").1.len(), format!("Q: {i}\nA: {o}").len() + 2);
    for name in ["alpaca", "alpaca-short", "vicuna"] {
        prep(&shop, &["data.json"], name, &["--template", name]).succeeds();
    }
    assert_ne!(shop.bytes("alpaca"), shop.bytes("vicuna"));

    let before = shop.snapshot();
    let refused = [
        ("alpacca", vec!["alpacca", "did you mean \"alpaca\"?", "alpaca-short, vicuna"]),
        ("no-answer.jinja", vec!["no-answer.jinja", "never writes {{ output }}"]),
        ("unknown.jinja", vec!["unknown.jinja", "line 1", "instruction, input and output"]),
        ("broken.jinja", vec!["broken.jinja", "line 1"]),
    ];
    shop.write("no-answer.jinja", "{{ instruction }}");
    shop.write("unknown.jinja", "{{ question }} {{ output }}");
    shop.write("broken.jinja", "{% if %}{{ output }}");
    let with_templates = shop.snapshot();
    assert!(with_templates.len() > before.len());
    for (name, words) in refused {
        prep(&shop, &["data.json"], "refused", &["--template", name]).fails(&words);
        assert_eq!(shop.snapshot(), with_templates, "{name}");
    }
}

/// What `prep` wrote into a run's folder is used while it is fresh, and made again when it is not.
#[test]
fn training_takes_up_prepared_rows_only_while_they_are_fresh() {
    let shop = Workshop::new();
    fs::create_dir(shop.path("run")).unwrap();
    let more = ["--template", "alpaca-short", "--max-seq-len", "96", "--val-size", "3"];
    prep(&shop, &["data.json"], "run/prepared.safetensors", &more).succeeds();
    let run = shop.train("run", "cpu", &["train.max_steps=2"]).succeeds();
    assert!(!run.out.contains("rows to train on"), "prepared already: {}", run.out);

    fs::create_dir(shop.path("stale")).unwrap();
    prep(&shop, &["data.json"], "stale/prepared.safetensors", &more).succeeds();
    let mut changed = records();
    changed.truncate(9);
    shop.write("data.json", json(&changed));
    let run = shop.train("stale", "cpu", &["train.max_steps=2"]).succeeds();
    assert_eq!(summed(&run.out, "rows to train on"), 6);
}
