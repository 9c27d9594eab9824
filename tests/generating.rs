//! `pronk generate`, `inspect logits` and `devices`, as their user runs them.
#![allow(clippy::unwrap_used, clippy::expect_used)] // in a test, a panic is the report

mod support;

use std::io::Read;
use std::process::Stdio;

use support::{Run, Workshop, command, devices, golden, prompt, tensor};

fn generate(shop: &Workshop, more: &[&str]) -> Run {
    let base = golden("tiny-gqa");
    shop.pronk(["generate", "--base", &base, "--instruction", "Hum?"].iter().chain(more))
}

#[test]
fn greedy_answers_are_always_the_same() {
    for device in devices() {
        let shop = Workshop::new();
        let answer = |more: &[&str]| generate(&shop, &[&["--device", device], more].concat()).succeeds();
        let first = answer(&["--max-new-tokens", "30"]);
        assert!(
            first.err.is_empty() && first.out.ends_with('\n'),
            "standard output holds the answer: {first:?}"
        );
        assert!(!first.out.contains("Instruction"), "and not the prompt");
        for more in [&["--seed", "9"][..], &["--temperature", "0"], &["--top-p", "0.5"]] {
            assert_eq!(answer(&[&["--max-new-tokens", "30"], more].concat()).out, first.out);
        }
        let adapted = answer(&["--max-new-tokens", "30", "--adapter", &golden("adapter-gqa")]);
        assert_ne!(adapted.out, first.out);
    }
}

/// The first token of a greedy answer against the logits that `inspect logits` writes.
#[test]
fn the_first_token_is_the_likeliest() {
    for device in devices() {
        let shop = Workshop::new();
        for instruction in ["Hum?", "What is wool?", "Sing.", "1 + 1"] {
            let (base, text) = (golden("tiny-gqa"), prompt(instruction));
            let args =
                ["inspect", "logits", "--base", &base, "--text", &text, "--out", "l", "--device", device];
            shop.pronk(args).succeeds();
            let (logits, shape) = tensor(&shop.bytes("l"), "logits");
            let last = &logits[(shape[0] - 1) * shape[1]..];
            let likeliest = (0..shape[1]).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap();

            // A record whose output is the answer has that token behind its prompt.
            let args = ["generate", "--base", &base, "--instruction", instruction, "--max-new-tokens", "1"];
            let more = ["--template", "alpaca-short", "--device", device];
            let answer = shop.pronk(args.iter().chain(&more)).succeeds().out;
            let answer = answer.strip_suffix('\n').unwrap();
            if answer.contains('\u{fffd}') || answer.is_empty() {
                continue; // half a character, or a special token: no text to tokenize
            }
            let records = [(instruction.to_owned(), answer.to_owned())];
            shop.write("d.json", support::json(&records));
            let args = ["prep", "--data", "d.json", "--base", &base, "--out", "p"];
            shop.pronk(args.iter().chain(&more[..2])).succeeds();
            let shown = shop.pronk(["inspect", "data", "p", "--row", "0"]).succeeds().out;
            let learned = shown.lines().find(|line| line.starts_with("response")).unwrap();
            let id: usize = learned.split_whitespace().nth(1).unwrap().parse().unwrap();
            assert_eq!(id, likeliest, "{instruction}");
        }
    }
}

#[test]
fn drawn_answers_belong_to_their_seed() {
    for device in devices() {
        let shop = Workshop::new();
        let draw = |seed: &str, top_p: &str| {
            let args = ["--temperature", "1.5", "--seed", seed, "--top-p", top_p, "--max-new-tokens", "30"];
            generate(&shop, &[&args[..], &["--device", device]].concat()).succeeds().out
        };
        assert_eq!(draw("3", "1"), draw("3", "1"));
        assert_ne!(draw("3", "1"), draw("4", "1"));
        let greedy = generate(&shop, &["--max-new-tokens", "30", "--device", device]).succeeds().out;
        assert_eq!(draw("3", "0.000001"), greedy, "next to nothing leaves the likeliest alone");
        assert_ne!(draw("3", "1"), greedy);
    }
}

#[test]
fn an_answer_ends_where_it_is_told_to() {
    let shop = Workshop::new();
    for most in [0, 1, 7] {
        let out = generate(&shop, &["--max-new-tokens", &most.to_string()]).succeeds().out;
        assert!(out.chars().count() <= most + 1, "{most}: {out:?}"); // a token is a byte here, and a newline
    }
    // Never beyond the base's context, whatever is asked for.
    generate(&shop, &["--max-new-tokens", "100000"]).succeeds();
    let long = "very ".repeat(100);
    generate(&shop, &["--input", &long]).fails(&["prompt", "tokens", "context is 256"]);
}

/// `pronk generate .. | head -c 0`
#[test]
fn a_closed_pipe_is_no_panic() {
    let shop = Workshop::new();
    for args in [
        vec!["devices"],
        vec!["--help"],
        vec!["generate", "--base", "BASE", "--instruction", "Hum?", "--max-new-tokens", "60"],
        vec!["prep", "--data", "data.json", "--base", "BASE", "--out", "o"],
    ] {
        let base = golden("tiny-gqa");
        let args = args.iter().map(|&arg| if arg == "BASE" { base.as_str() } else { arg });
        let mut child =
            command(shop.root()).args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let mut err = String::new();
        child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        assert_eq!((child.wait().unwrap().code(), err.as_str()), (Some(0), ""));
    }
}

#[test]
fn knobs_out_of_range_are_refused() {
    let shop = Workshop::new();
    generate(&shop, &["--temperature", "-1"]).fails(&["--temperature", "from 0", "found -1"]);
    generate(&shop, &["--temperature", "nan"]).fails(&["--temperature", "NaN"]);
    generate(&shop, &["--top-p", "0"]).fails(&["--top-p", "above 0", "found 0"]);
    generate(&shop, &["--top-p", "1.5"]).fails(&["--top-p", "up to 1", "found 1.5"]);
    generate(&shop, &["--max-new-tokens", "-3"]).fails(&["--max-new-tokens"]);
    generate(&shop, &["--template", "vicunia"]).fails(&["vicunia", "did you mean \"vicuna\"?"]);
}

/// Trained with `base.quantize`, then used: what the cache holds is a base like any other.
#[test]
fn a_quantized_base_is_kept_and_is_a_base() {
    for (scheme, device) in [("nf4", "cpu"), ("int8", devices()[devices().len() - 1])] {
        let shop = Workshop::new();
        let set = format!("base.quantize={scheme}");
        let train =
            |run, more: &[&str]| shop.train(run, device, &[&[set.as_str()], more].concat()).succeeds();
        let told = train("first", &[]).out;
        let made = format!("base      quantized to {scheme}, kept in ");
        let cached = told.lines().find_map(|line| line.strip_prefix(&made)).expect(&told);
        assert!(shop.read("first/recipe.toml").contains(&format!("quantize = \"{scheme}\"")));
        let told = train("second", &[]).out;
        assert!(told.contains(&format!("base      quantized to {scheme}, from {cached}\n")), "{told}");
        assert_eq!(shop.losses("first"), shop.losses("second"));
        let plain = shop.train("plain", device, &[]).succeeds().out;
        assert!(!plain.contains("quantized"), "{plain}");
        assert_ne!(shop.losses("first"), shop.losses("plain"), "quantizing must change something");

        // Trained as it is, it is the same base, and needs no cache.
        let path = format!("base.path={cached}");
        let told = train("third", &[&path]).out;
        assert!(told.contains(&format!("it is quantized to {scheme} as it is")), "{told}");
        assert_eq!(shop.losses("first"), shop.losses("third"));
        let more = ["--adapter", "first/adapter", "--max-new-tokens", "8", "--device", device];
        let args = ["generate", "--base", cached, "--instruction", "Hum?"];
        let answer = shop.pronk(args.iter().chain(&more)).succeeds();
        assert!(answer.err.is_empty(), "{answer:?}");

        let args =
            ["merge", "--base", cached, "--adapter", "first/adapter", "--out", "merged", "--device", device];
        let merged = shop.pronk(args).succeeds();
        let note = format!(
            "{cached} is quantized ({scheme}): the merged model keeps what its weights were rounded to"
        );
        assert!(merged.err.contains(&note), "{merged:?}");
        let config = shop.read("merged/config.json");
        assert!(
            !config.contains("quantization_config") && config.contains("\"dtype\": \"float32\""),
            "{config}"
        );
        let args = ["generate", "--base", "merged", "--instruction", "Hum?"];
        let merged = shop.pronk(args.iter().chain(&more[2..])).succeeds();
        assert_eq!(merged.out, answer.out);
    }
}

#[test]
fn devices_are_listed() {
    let shop = Workshop::new();
    let out = shop.pronk(["devices"]).succeeds().out;
    assert!(out.lines().any(|line| line.split_whitespace().eq(["cpu", "cpu"])), "{out}");
    for backend in ["cuda", "rocm", "vulkan", "metal", "tch:cpu"] {
        assert!(out.lines().any(|line| line.starts_with(backend)), "{backend}: {out}");
    }
}
