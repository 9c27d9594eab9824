//! `pronk chat` and `pronk generate --batch`, as their user runs them.
#![allow(clippy::unwrap_used, clippy::expect_used)] // in a test, a panic is the report

mod support;

use std::io::Write;
use std::process::Stdio;

use serde_json::{Value, json};
use support::{Run, Workshop, command, golden};

/// A chat template in which every part of a conversation has its place.
const OWN: &str = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}\
                   {% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}";

/// `pronk chat` on the tiny base, with `lines` on its standard input.
fn chat(shop: &Workshop, more: &[&str], lines: &str) -> Run {
    let base = golden("tiny-gqa");
    let fixed = ["chat", "--base", &base, "--max-new-tokens", "8", "--device", "cpu"];
    let mut child = command(shop.root())
        .args(fixed.iter().chain(more))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    child.wait_with_output().unwrap().into()
}

fn batch(shop: &Workshop, out: &str, more: &[&str]) -> Run {
    let base = golden("tiny-gqa");
    let fixed = ["generate", "--base", &base, "--batch", "batch.jsonl", "--out", out, "--device", "cpu"];
    shop.pronk(fixed.iter().chain(more))
}

/// The prompts that `--verbose-prompt` showed.
fn prompts(run: &Run) -> Vec<Vec<u32>> {
    let shown = run.err.lines().filter_map(|line| line.strip_prefix("prompt: "));
    shown.map(|ids| serde_json::from_str(ids).unwrap()).collect()
}

/// How many prompt tokens each answer of a chat read, of how many.
fn read(run: &Run) -> Vec<(usize, usize)> {
    let lines = run.err.lines().filter(|line| line.contains("prompt tokens read"));
    let numbers = lines.map(|line| {
        let mut words = line.trim_start_matches('[').split_whitespace();
        let mut number = || words.find_map(|word| word.parse::<usize>().ok()).unwrap();
        (number(), number())
    });
    numbers.collect()
}

/// The contents of the assistant's messages.
fn answers(record: &Value) -> Vec<&str> {
    let messages = record["messages"].as_array().unwrap().iter();
    messages.filter(|m| m["role"] == "assistant").map(|m| m["content"].as_str().unwrap()).collect()
}

fn objects(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_conversation_goes_on_and_is_kept() {
    let shop = Workshop::new();
    let more = ["--template", "alpaca-short"];
    let run = chat(&shop, &more, "Hum?\n\nAnd now?\n/save talk.jsonl\n/quit\nnever read\n").succeeds();
    let record: Value = serde_json::from_str(&shop.read("talk.jsonl")).unwrap();
    let said: String = answers(&record).iter().map(|answer| format!("{answer}\n")).collect();
    assert_eq!(run.out, said, "standard output holds the answers alone");
    assert_eq!(record["messages"].as_array().unwrap().len(), 4);
    let figures = run.err.lines().filter(|line| line.contains("tokens")).count();
    assert_eq!(figures, 2, "{}", run.err);
    let [(first, all), (second, both)] = read(&run)[..] else { panic!("{}", run.err) };
    assert_eq!(first, all, "nothing was read before");
    assert!(second <= both - all, "the first prompt is not read again: {second} of {both}, first {all}");

    // Asked again without a cache, by what was saved, the last answer is the same.
    shop.write("batch.jsonl", shop.bytes("talk.jsonl"));
    batch(&shop, "out.jsonl", &["--template", "alpaca-short", "--max-new-tokens", "8"]).succeeds();
    let again = objects(&shop.read("out.jsonl"));
    assert_eq!(again[0]["generated_text"].as_str().unwrap(), answers(&record)[1]);
    assert_eq!(again[0]["messages"], record["messages"]);
}

#[test]
fn commands_do_what_they_say() {
    let shop = Workshop::new();
    shop.write("own.jinja", OWN);
    let (one, other) =
        (format!("one={}", golden("adapter-gqa")), format!("two={}", golden("adapter-rslora")));
    let more = ["--template", "own.jinja", "--verbose-prompt", "--adapter", &one, "--adapter", &other];
    let lines = "Hum?\n/reset\nHum?\n/adapter two\n/reset\nHum?\n/adapter\n/adapter three\n/system Be kind.\n\
                 /reset\nHum?\n/frobnicate\n//slash\n/save a\n/save a\n/save\n/help\n";
    let run = chat(&shop, &more, lines).succeeds();
    let shown = prompts(&run);
    assert_eq!(shown.len(), 5);
    assert_eq!(shown[0], shown[1], "a reset begins anew");
    assert_eq!(shown[0], shown[2]);
    assert!(shown[3].len() == shown[0].len() + "[system] Be kind.".len() + 1, "{shown:?}");
    let read = read(&run);
    assert_eq!(read[1].0, 1, "the same prompt again");
    assert_eq!(read[2].0, read[2].1, "what one adapter has read is nothing to the other");
    for words in [
        "  one\n* two\n",
        "no adapter called \"three\"; there are: \"one\", \"two\"",
        "/frobnicate: no such command",
        "/save a",
        "exists",
        "/save: expected the name of a file",
        "Ctrl-C ends an answer",
    ] {
        assert!(run.err.contains(words), "{words:?} is not in {}", run.err);
    }
    let saved: Value = serde_json::from_str(&shop.read("a")).unwrap();
    assert_eq!(saved["messages"][0], json!({"role": "system", "content": "Be kind."}));
    assert_eq!(saved["messages"][3]["content"], "/slash");
}

#[test]
fn what_cannot_be_asked_is_told_and_the_next_line_may_go_better() {
    let shop = Workshop::new();
    shop.write("one-turn.jinja", "Q: {{ instruction }}\nA: {{ output }}");
    let long = format!("{}\nHum?\n", "very ".repeat(80));
    let run = chat(&shop, &["--template", "alpaca-short"], &long).succeeds();
    assert!(run.err.contains("context is 256") && run.err.contains("/reset begins anew"), "{}", run.err);
    assert_eq!(read(&run).len(), 1);
    let run =
        chat(&shop, &["--template", "one-turn.jinja", "--verbose-prompt"], "a\nb\n/system c\n").succeeds();
    let shown = prompts(&run);
    assert_eq!(shown[0].len(), shown[1].len(), "a template of one turn is asked each alone");
    assert!(run.err.contains("knows instruction and input only"), "{}", run.err);
    let base = golden("tiny-gqa");
    let twice = ["chat", "--base", &base, "--adapter", "a=x", "--adapter", "a=y"];
    shop.pronk(twice).fails(&["two are called \"a\""]);
    shop.pronk(["chat", "--base", &base, "--min-p", "2"]).fails(&["--min-p", "from 0 to 1"]);
    shop.pronk(["chat", "--base", &base, "--repetition-penalty", "0"]).fails(&["--repetition-penalty"]);
}

/// A conversation, tokenized wherever a template is used: by chat and generate, as a training row, and by the merged
/// model. (Beside transformers it is in tests/peers.)
#[test]
fn one_conversation_has_the_same_tokens_everywhere() {
    for template in ["alpaca-short", "own.jinja"] {
        let shop = Workshop::new();
        shop.write("own.jinja", OWN);
        let set = format!("data.template={template}");
        shop.train("run", "cpu", &[&set, "train.max_steps=2", "train.eval_steps=0"]).succeeds();
        let adapter = ["--adapter", "run/adapter", "--verbose-prompt"];
        let talk = chat(&shop, &adapter, "/system Be brief.\nHum?\nAnd now?\n/save talk.jsonl\n").succeeds();
        let talked = prompts(&talk);

        let base = golden("tiny-gqa");
        let stored = "run/adapter/chat_template.jinja";
        let prep = ["prep", "--data", "talk.jsonl", "--base", &base, "--template", stored, "--out", "rows"];
        shop.pronk(prep).succeeds();
        let row = shop.pronk(["inspect", "data", "rows", "--row", "0"]).succeeds().out;
        let marked = |mark: &str| -> Vec<u32> {
            let lines = row.lines().skip(1).filter(|line| line.starts_with(mark));
            lines.map(|line| line.split_whitespace().nth(1).unwrap().parse().unwrap()).collect()
        };
        let whole = marked("");
        assert!(whole.starts_with(&talked[0]) && whole.starts_with(&talked[1]), "{template}");
        let learned = marked("response").len();
        assert!(learned > 2 && whole.len() > talked[1].len());

        shop.write("batch.jsonl", shop.bytes("talk.jsonl"));
        let more = ["--max-new-tokens", "1"];
        let asked = batch(&shop, "out", &[&adapter[..], &more].concat()).succeeds();
        assert_eq!(prompts(&asked), talked[1..], "{template}");
        shop.pronk(["merge", "--base", &base, "--adapter", "run/adapter", "--out", "merged"]).succeeds();
        let args =
            ["generate", "--base", "merged", "--batch", "batch.jsonl", "--out", "o", "--verbose-prompt"];
        assert_eq!(prompts(&shop.pronk(args.iter().chain(&more)).succeeds()), talked[1..], "{template}");
    }
}

#[test]
fn a_batch_goes_on_where_it_stopped() {
    let shop = Workshop::new();
    let questions: String = (0..5)
        .map(|i| {
            let adapter = ["one", "two"][i % 2];
            let question = json!({"instruction": format!("Hum {i}?"), "id": i, "adapter": adapter});
            format!("{question}\n\n")
        })
        .collect();
    shop.write("batch.jsonl", &questions);
    let (one, two) = (format!("one={}", golden("adapter-gqa")), format!("two={}", golden("adapter-rslora")));
    let drawn =
        ["--template", "alpaca-short", "--max-new-tokens", "12", "--temperature", "1.3", "--top-k", "40"];
    let more = [&drawn[..], &["--adapter", &one, "--adapter", &two]].concat();
    let run = batch(&shop, "whole", &more).succeeds();
    assert!(run.out.contains("answered 5 of 5"), "{}", run.out);
    let whole = shop.bytes("whole");
    let lines = objects(&shop.read("whole"));
    assert!(lines.iter().map(|line| line["id"].as_u64().unwrap()).eq(0..5), "in order");
    assert_eq!(lines[1]["adapter"], "two");
    assert!(lines.iter().all(|line| ["stop", "length"].contains(&line["finish_reason"].as_str().unwrap())));

    let ends: Vec<usize> = (0..whole.len()).filter(|&at| whole[at] == b'\n').collect();
    for cut in [0, ends[1] + 1, ends[1] + 9, ends[3], whole.len()] {
        shop.write("part", &whole[..cut]);
        let run = batch(&shop, "part", &more).succeeds();
        assert!(shop.bytes("part") == whole, "cut to {cut}");
        let torn = cut == ends[1] + 9 || cut == ends[3];
        assert_eq!(run.err.contains("its last line was cut short"), torn, "{cut}: {}", run.err);
    }

    // Answers to other questions, or of another adapter, are left as they are.
    shop.write("part", &whole[..=ends[2]]);
    for (from, to) in [("Hum 1?", "Hem 1?"), ("\"two\"", "\"one\"")] {
        shop.write("batch.jsonl", questions.replace(from, to));
        batch(&shop, "part", &more).fails(&["part: line 2 is not what batch.jsonl", "a new file"]);
        assert!(shop.bytes("part") == whole[..=ends[2]]);
    }
    shop.write("batch.jsonl", questions.lines().next().unwrap());
    batch(&shop, "part", &more).fails(&["part: line 2 is not what"]);
}

#[test]
fn bad_batches_are_refused_before_anything_is_written() {
    let shop = Workshop::new();
    let bad = "{\"instruction\": \"a\"}\n[1]\n{\"instruction\": 7}\n{\"x\": 1}\n{\"prompt\": \"a\", \"adapter\": \"b\"}\n";
    shop.write("batch.jsonl", bad);
    let before = shop.snapshot();
    batch(&shop, "out", &[]).fails(&[
        "batch.jsonl: line 2: ",
        "line 3: `instruction` is a number",
        "line 4: expected instruction, messages or prompt; there are: x",
        "line 5: there is no adapter called \"b\"",
    ]);
    shop.write("batch.jsonl", "");
    batch(&shop, "out", &[]).fails(&["batch.jsonl: no question"]);
    shop.write("batch.jsonl", bad);
    assert!(shop.snapshot() == before);
    shop.write("batch.jsonl", "{\"prompt\": \"a\"}\n");
    batch(&shop, "batch.jsonl", &[]).fails(&["--out batch.jsonl: that is the batch itself"]);
    batch(&shop, "nowhere/out", &[]).fails(&["nowhere/out"]);
    batch(&shop, "out", &["--instruction", "a"]).fails(&["--instruction"]);
}

#[test]
fn several_adapters_answer_under_their_names() {
    let shop = Workshop::new();
    let base = golden("tiny-gqa");
    let adapters = [golden("adapter-gqa"), golden("adapter-rslora")];
    let ask = |adapter: &[String]| {
        let args = ["generate", "--base", &base, "--instruction", "Hum?", "--max-new-tokens", "9"];
        let adapter = adapter.iter().flat_map(|adapter| ["--adapter", adapter]);
        shop.pronk(args.into_iter().chain(adapter)).succeeds().out
    };
    let [one, two] = adapters.each_ref().map(|adapter| ask(std::slice::from_ref(adapter)));
    let named = [format!("one={}", adapters[0]), format!("two={}", adapters[1])];
    assert_eq!(ask(&named), format!("## one\n{one}## two\n{two}"));
    assert_ne!(one, two);
}
