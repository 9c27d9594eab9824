//! A real Llama from a GGUF file: SmolLM2-135M-Instruct, against transformers.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test reports by panicking

mod golden;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;

use golden::{Answers, assert_close, devices, host, workspace};
use pronk_lora::ForwardMode;
use pronk_model::{
    Base, CheckpointWriter, Decoder, LoadConfig, Residency, Sampling, Scheme, TensorSpec, generate, quantized,
};
use safetensors::Dtype;

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
            check_logits(&decoder, &expected, text, &name);
        }
        for prompt in 0..3 {
            check_greedy(&decoder, &expected, prompt, eos, &name);
        }
    }
}

/// Its blocks are multiplied with as they lie in the file: that must be nothing but its numbers.
#[test]
fn quantized_weights_answer_as_their_numbers() {
    let base = Base::open(&gguf()).unwrap();
    assert_eq!((base.quantization().as_deref(), base.note()), (Some("Q4_1"), None));
    let dir = tempfile::TempDir::new().unwrap();
    let dense = dequantized(&base, dir.path());
    let token_ids = Answers::read("smollm2.safetensors").ids("text0.token_ids");
    for (name, device) in devices() {
        let run = |base: &Base, weights| {
            let config = LoadConfig { weights, ..LoadConfig::default() };
            let decoder = Decoder::load(base, &device, config, |_, _| {}).unwrap();
            host(decoder.logits(&token_ids, ForwardMode::inference(None)))
        };
        let found = run(&base, Residency::Resident);
        assert_close(&format!("SmolLM2 in Q4_1 on {name}"), &found, &run(&dense, Residency::Resident), 1e-5);
        assert_eq!(run(&base, Residency::Streamed), found, "streamed on {name}");
    }
}

/// The same numbers as a float32 directory.
fn dequantized(base: &Base, dir: &Path) -> Base {
    let spec = |(name, shape)| TensorSpec { name, dtype: Dtype::F32, shape };
    let specs: Vec<TensorSpec> = base.config.tensors().into_iter().map(spec).collect();
    let mut writer = CheckpointWriter::create(dir, specs.clone(), 5_000_000_000).unwrap();
    writer.add_file("config.json", base.config.to_json("float32").to_string().as_bytes()).unwrap();
    for spec in specs {
        writer.write(&spec.name, &base.read(&spec.name).unwrap().bytes).unwrap();
    }
    writer.finish().unwrap();
    Base::open(dir).unwrap()
}

#[test]
fn what_is_quantized_is_not_quantized_again() {
    let base = Base::open(&gguf()).unwrap();
    let dir = tempfile::TempDir::new().unwrap();
    let refused = quantized(&base, Scheme::Nf4, dir.path(), |_, _| ControlFlow::Continue(())).unwrap_err();
    let told = refused.to_string();
    assert!(told.contains("to quantize to nf4, found Q4_1") && told.contains("leave quantize out"), "{told}");
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
    let sampling = Sampling { max_new_tokens: greedy.len(), ..Sampling::default() };
    if greedy.last() == Some(&eos) {
        greedy.pop(); // the goldens keep the end of sequence, `generate` does not
    }
    let mode = ForwardMode::inference(None);
    let answer =
        generate(decoder, mode, &token_ids, &[eos], sampling, |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(answer, greedy, "prompt {prompt} on {device}");
}
