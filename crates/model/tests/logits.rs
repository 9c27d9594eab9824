//! The decoder's logits against those of transformers and PEFT, on random Llamas of every kind and on
//! every other family.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test reports by panicking

mod golden;

use std::ops::ControlFlow;

use burn::tensor::Device;
use golden::{Answers, assert_close, devices, host, workspace};
use pronk_lora::{Adapter, ForwardMode};
use pronk_model::{Base, Decoder, Ending, KeyValueCache, LoadConfig, Sampling, answer, generate};

const VARIANTS: [&str; 12] = [
    "gqa",
    "tied",
    "bias",
    "head-dim",
    "rope-linear",
    "rope-llama3",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
];
/// File of answers, and the adapters in it.
const ADAPTERS: [(&str, &[&str]); 2] = [
    ("lora-gradients.safetensors", &["gqa", "tied", "rslora"]),
    ("family-gradients.safetensors", &["mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]),
];
const TOLERANCE: f32 = 1e-4;

fn decoder(variant: &str, device: &Device) -> Decoder {
    let base = Base::open(&workspace(&format!("tests/golden/tiny-{variant}"))).unwrap();
    Decoder::load(&base, device, LoadConfig::default(), |_, _| {}).unwrap()
}

fn adapter(name: &str, decoder: &Decoder) -> Adapter {
    let dir = workspace(&format!("tests/golden/adapter-{name}"));
    Adapter::load(&dir, &decoder.config.linear_modules(), decoder.device()).unwrap()
}

/// The base that an adapter of the goldens sits on.
fn base_of(adapter: &str) -> &str {
    if adapter == "rslora" { "gqa" } else { adapter }
}

#[test]
fn the_list_of_variants_is_complete() {
    let entries = std::fs::read_dir(workspace("tests/golden")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(names.filter(|name| name.starts_with("tiny-")).count(), VARIANTS.len());
}

#[test]
fn bases_answer_as_in_transformers() {
    for (name, device) in devices() {
        for variant in VARIANTS {
            let expected = Answers::read(&format!("tiny-{variant}/expected.safetensors"));
            let logits =
                decoder(variant, &device).logits(&expected.ids("token_ids"), ForwardMode::inference(None));
            let what = format!("tiny-{variant} on {name}");
            assert_close(&what, &host(logits), &expected.floats("logits"), TOLERANCE);
        }
    }
}

#[test]
fn adapters_answer_as_in_peft() {
    for (file, names) in ADAPTERS {
        adapters_of(file, names);
    }
}

fn adapters_of(file: &str, names: &[&str]) {
    let expected = Answers::read(file);
    for (device_name, device) in devices() {
        for &name in names {
            let decoder = decoder(base_of(name), &device);
            let adapter = adapter(name, &decoder);
            let first = expected.ids(&format!("{name}.document_lengths"))[0] as usize;
            let token_ids = &expected.ids(&format!("{name}.token_ids"))[..first];
            let logits = host(decoder.logits(token_ids, ForwardMode::inference(Some(&adapter))));
            let what = format!("adapter-{name} on {device_name}");
            assert_close(&what, &logits, &expected.floats(&format!("{name}.logits")), TOLERANCE);

            let alone = host(decoder.logits(token_ids, ForwardMode::inference(None)));
            assert!(golden::relative_error(&alone, &logits) > 0.01, "{what}: changes nothing");
        }
    }
}

/// Records that lie one after another answer as each alone does.
#[test]
fn documents_do_not_see_each_other() {
    let golden = Answers::read("lora-gradients.safetensors");
    let token_ids = golden.ids("gqa.token_ids");
    let lengths = golden.ids("gqa.document_lengths");
    let ends = lengths.iter().scan(0, |end, &n| {
        *end += n as usize;
        Some(*end)
    });
    let documents: Vec<_> = ends.zip(&lengths).map(|(end, &n)| end - n as usize..end).collect();
    let positions: Vec<u32> = lengths.iter().flat_map(|&n| 0..n).collect();
    for (name, device) in devices() {
        let decoder = decoder("gqa", &device);
        let mode = ForwardMode::inference(None);
        let layout = decoder.layout(&positions, &documents);
        let together = decoder.hidden(&token_ids, &layout, mode);
        for rows in documents.clone() {
            let alone: Vec<u32> = (0..rows.len() as u32).collect();
            let layout = decoder.layout(&alone, std::slice::from_ref(&(0..rows.len())));
            let alone = decoder.hidden(&token_ids[rows.clone()], &layout, mode);
            let part = host(together.clone().narrow(0, rows.start, rows.len()));
            assert_close(&format!("rows {rows:?} on {name}"), &part, &host(alone), 1e-5);
        }
    }
}

#[test]
fn cached_generation_equals_uncached_argmax() {
    const NEW_TOKENS: usize = 40;
    for (name, device) in devices() {
        for variant in VARIANTS {
            let decoder = decoder(variant, &device);
            let adapted = ADAPTERS.iter().any(|(_, names)| names.contains(&variant));
            let adapter = adapted.then(|| adapter(variant, &decoder));
            for adapter in [None, adapter.as_ref()] {
                let mode = ForwardMode::inference(adapter);
                let prompt =
                    &Answers::read(&format!("tiny-{variant}/expected.safetensors")).ids("token_ids")[..9];
                let mut heard = Vec::new();
                let listen = |token| {
                    heard.push(token);
                    ControlFlow::Continue(())
                };
                let answer = generate(&decoder, mode, prompt, &[], greedy(NEW_TOKENS), listen).unwrap();

                let mut text = prompt.to_vec();
                for (step, &token) in answer.iter().enumerate() {
                    let logits = host(decoder.logits(&text, mode));
                    let best = argmax(&logits[logits.len() - decoder.config.vocab_size..]);
                    assert_eq!(token, best, "token {step} of tiny-{variant} on {name}");
                    text.push(best);
                }
                assert_eq!(heard, answer);
                assert_eq!(answer.len(), NEW_TOKENS);
            }
        }
    }
}

#[test]
fn generation_ends_where_it_is_told_to() {
    let (_, device) = devices().swap_remove(0);
    let decoder = decoder("gqa", &device);
    let mode = ForwardMode::inference(None);
    let run = |prompt: &[u32], stop: &[u32], limit: usize| {
        generate(&decoder, mode, prompt, stop, greedy(limit), |_| ControlFlow::Continue(())).unwrap()
    };
    let prompt = [1, 70, 71, 72];
    let free = run(&prompt, &[], 12);
    assert_eq!(free.len(), 12);

    let stop = free[5];
    let first = free.iter().position(|&token| token == stop).unwrap();
    assert_eq!(run(&prompt, &[stop], 12), free[..first], "the stop token itself stays away");

    let broken = generate(&decoder, mode, &prompt, &[], greedy(12), |_| ControlFlow::Break(())).unwrap();
    assert_eq!(broken, free[..1]);

    let context = decoder.config.max_position_embeddings;
    assert_eq!(run(&vec![70; context - 3], &[], 12).len(), 3, "the context is full then");
    assert!(run(&vec![70; context], &[], 12).is_empty());
    assert!(run(&[], &[], 12).is_empty());
    assert!(run(&prompt, &[], 0).is_empty());
}

/// A conversation: each prompt begins with the one before and its answer, as it was or otherwise.
#[test]
fn what_was_read_before_is_not_read_again() {
    let listen = |_| ControlFlow::Continue(());
    for (name, device) in devices() {
        for variant in VARIANTS {
            let decoder = decoder(variant, &device);
            let mode = ForwardMode::inference(None);
            let ids = Answers::read(&format!("tiny-{variant}/expected.safetensors")).ids("token_ids");
            let mut cache = KeyValueCache::default();
            let mut ask = |prompt: &[u32]| {
                let found = answer(&mut cache, &decoder, mode, prompt, &[], greedy(6), listen).unwrap();
                let alone = generate(&decoder, mode, prompt, &[], greedy(6), listen).unwrap();
                assert_eq!(found.token_ids, alone, "tiny-{variant} on {name}");
                assert_eq!(found.ending, Ending::Length);
                found
            };
            let first = ask(&ids[..9]);
            assert_eq!(first.computed, 9);
            let mut next = [&ids[..9], &first.token_ids].concat();
            next.extend(&ids[3..6]);
            // The last token of an answer has not been read when it ends.
            assert_eq!(ask(&next).computed, 4);
            assert_eq!(ask(&next).computed, 1, "the same again");
            next[7] = (next[7] + 1) % 50;
            assert_eq!(ask(&next).computed, next.len() - 7, "another beginning");
            assert_eq!(ask(&ids[..4]).computed, 1);
        }
    }
}

fn greedy(max_new_tokens: usize) -> Sampling {
    Sampling { max_new_tokens, ..Sampling::default() }
}

fn argmax(logits: &[f32]) -> u32 {
    let best = (0..).zip(logits).reduce(|best, next| if next.1 > best.1 { next } else { best });
    best.unwrap().0
}
