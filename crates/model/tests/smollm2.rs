//! A real Llama from a GGUF file: SmolLM2-135M-Instruct, against transformers.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test reports by panicking

mod golden;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::Command;

use golden::{Answers, assert_close, devices, host, workspace};
use pronk_lora::ForwardMode;
use pronk_model::{Base, Decoder, LoadConfig, Sampling, generate};

const TOLERANCE: f32 = 1e-4;

/// The file that `SMOLLM2_GGUF` names, or the one that `scripts/smollm2` leaves in `target`.
fn gguf() -> PathBuf {
    if let Some(path) = std::env::var_os("SMOLLM2_GGUF") {
        return path.into();
    }
    // The script does nothing but print the path where the file is there.
    let script = workspace("scripts/smollm2");
    let output = Command::new(&script).output().unwrap_or_else(|e| panic!("{}: {e}", script.display()));
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "scripts/smollm2 failed, and SMOLLM2_GGUF is not set: {told}");
    String::from_utf8(output.stdout).unwrap().trim_end().into()
}

/// One test, so that the model is read once a device.
#[test]
fn answers_as_in_transformers() {
    let base = Base::open(&gguf()).unwrap();
    let eos = base.gguf().unwrap().number("tokenizer.ggml.eos_token_id").unwrap() as u32;
    let expected = Answers::read("smollm2.safetensors");
    for (name, device) in devices() {
        let decoder = Decoder::load(&base, &device, LoadConfig::default(), |_, _| {}).unwrap();
        for text in 0..5 {
            check_logits(&decoder, &expected, text, name);
        }
        for prompt in 0..3 {
            check_greedy(&decoder, &expected, prompt, eos, name);
        }
    }
}

fn check_logits(decoder: &Decoder, expected: &Answers, text: usize, device: &str) {
    let vocab_ids = expected.ids("vocab_ids");
    let token_ids = expected.ids(&format!("text{text}.token_ids"));
    let logits = host(decoder.logits(&token_ids, ForwardMode::inference(None)));
    let rows = || logits.chunks_exact(decoder.config.vocab_size);

    let chosen: Vec<f32> = rows().flat_map(|row| vocab_ids.iter().map(|&id| row[id as usize])).collect();
    let what = format!("SmolLM2, text {text} on {device}");
    assert_close(&what, &chosen, &expected.floats(&format!("text{text}.logits")), TOLERANCE);

    let sums: Vec<f32> = rows().map(logsumexp).collect();
    let what = format!("{what}, logsumexp");
    assert_close(&what, &sums, &expected.floats(&format!("text{text}.logsumexp")), TOLERANCE);
}

fn logsumexp(row: &[f32]) -> f32 {
    let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&logit| f64::from(logit - top).exp()).sum();
    top + sum.ln() as f32
}

fn check_greedy(decoder: &Decoder, expected: &Answers, prompt: usize, eos: u32, device: &str) {
    let token_ids = expected.ids(&format!("prompt{prompt}.token_ids"));
    let mut greedy = expected.ids(&format!("prompt{prompt}.greedy"));
    let sampling = Sampling { max_new_tokens: greedy.len(), temperature: 0.0, top_p: 1.0, seed: 0 };
    if greedy.last() == Some(&eos) {
        greedy.pop(); // the goldens keep the end of sequence, `generate` does not
    }
    let mode = ForwardMode::inference(None);
    let answer =
        generate(decoder, mode, &token_ids, &[eos], sampling, |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(answer, greedy, "prompt {prompt} on {device}");
}
