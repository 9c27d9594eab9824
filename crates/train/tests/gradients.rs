//! Loss and `LoRA` gradients against PEFT's, on every CPU device, with and without recompute.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test may panic

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use pronk_data::{PackedBatch, TokenizedExample};
use pronk_kernels::{Dropout, DropoutKey, open_device};
use pronk_lora::{Adapter, LoraConfig, TargetModules};
use pronk_model::{Base, Decoder, LoadConfig};
use pronk_train::{MicroBatchLoss, loss_and_gradients, loss_only};
use safetensors::SafeTensors;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
}

fn devices() -> Vec<Device> {
    let mut names = Vec::new();
    names.extend(cfg!(feature = "flex").then_some("cpu"));
    names.extend(cfg!(feature = "tch").then_some("tch:cpu"));
    assert!(!names.is_empty(), "build with --features flex, tch, or both");
    names.into_iter().map(|name| open_device(name).unwrap()).collect()
}

fn decoder(name: &str, device: &Device) -> (Base, Decoder) {
    let base = Base::open(&golden().join(name)).unwrap();
    let decoder = Decoder::load(&base, device, LoadConfig::default(), |_, _| ()).unwrap();
    (base, decoder)
}

fn floats(file: &SafeTensors, key: &str) -> Vec<f32> {
    let bytes = file.tensor(key).unwrap().data();
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn whole_numbers(file: &SafeTensors, key: &str) -> Vec<usize> {
    let bytes = file.tensor(key).unwrap().data();
    bytes.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as usize).collect()
}

/// The golden's documents, as rows.
fn examples(file: &SafeTensors, case: &str) -> Vec<TokenizedExample> {
    let ids = whole_numbers(file, &format!("{case}.token_ids"));
    let mask = file.tensor(&format!("{case}.loss_mask")).unwrap().data().to_vec();
    let mut start = 0;
    let mut examples = Vec::new();
    for length in whole_numbers(file, &format!("{case}.document_lengths")) {
        let rows = start..start + length;
        examples.push(TokenizedExample {
            token_ids: ids[rows.clone()].iter().map(|&id| id as u32).collect(),
            loss_mask: mask[rows].iter().map(|&m| m == 1).collect(),
        });
        start += length;
    }
    examples
}

fn pack(examples: &[TokenizedExample]) -> PackedBatch {
    PackedBatch::concat(examples.iter().map(TokenizedExample::view))
}

/// Largest difference, relative to the largest reference value.
fn relative_error(ours: &Tensor<2>, reference: &[f32]) -> f32 {
    let ours: Vec<f32> = ours.try_to_vec_as().unwrap();
    assert_eq!(ours.len(), reference.len());
    let largest = reference.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    ours.iter().zip(reference).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
}

fn loss(micro: &MicroBatchLoss) -> f32 {
    micro.sum.clone().into_scalar()
}

#[test]
fn loss_and_gradients_equal_pefts() {
    let bytes = fs::read(golden().join("lora-gradients.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    for device in devices() {
        for (case, model) in [("gqa", "tiny-gqa"), ("tied", "tiny-tied"), ("rslora", "tiny-gqa")] {
            let (base, decoder) = decoder(model, &device);
            let modules = base.config.linear_modules();
            let adapter =
                Adapter::load(&golden().join(format!("adapter-{case}")), &modules, &device).unwrap();
            let batch = pack(&examples(&file, case));
            for kept in [usize::MAX, 0, 1] {
                let n = batch.supervised();
                let micro = loss_and_gradients(&decoder, &adapter, &batch, n, kept, None);
                let expected = floats(&file, &format!("{case}.loss"))[0];
                let mean = loss(&micro) / n as f32;
                assert!((mean / expected - 1.0).abs() < 1e-5, "{case}: loss {mean}, PEFT's is {expected}");
                assert_eq!(micro.gradients.pairs.len(), adapter.pairs.len());
                for (name, pair) in &micro.gradients.pairs {
                    for (half, ours) in [("lora_A", &pair.a), ("lora_B", &pair.b)] {
                        let key = format!("{case}.gradient.base_model.model.{name}.{half}.weight");
                        let error = relative_error(ours, &floats(&file, &key));
                        assert!(error < 1e-4, "{device:?} {kept} kept, {key}: {error}");
                    }
                }
            }
        }
    }
}

#[test]
fn micro_batches_add_up_to_the_whole() {
    let bytes = fs::read(golden().join("lora-gradients.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    for device in devices() {
        let (base, decoder) = decoder("tiny-gqa", &device);
        let modules = base.config.linear_modules();
        let adapter = Adapter::load(&golden().join("adapter-gqa"), &modules, &device).unwrap();
        let examples = examples(&file, "gqa");
        let whole = pack(&examples);
        let n = whole.supervised();
        let at_once = loss_and_gradients(&decoder, &adapter, &whole, n, 0, None);
        let mut sum = pronk_train::Gradients::default();
        let mut losses = 0.0;
        for example in examples.chunks(1) {
            let part = loss_and_gradients(&decoder, &adapter, &pack(example), n, 0, None);
            losses += loss(&part);
            sum.accumulate(part.gradients);
        }
        assert!((losses / loss(&at_once) - 1.0).abs() < 1e-5);
        for (name, pair) in &at_once.gradients.pairs {
            let reference: Vec<f32> = pair.b.try_to_vec_as().unwrap();
            assert!(relative_error(&sum.pairs[name].b, &reference) < 1e-4, "{name}");
        }
        let plain: f32 = loss_only(&decoder, Some(&adapter), &whole).into_scalar();
        assert!((plain / loss(&at_once) - 1.0).abs() < 1e-5);
    }
}

#[test]
fn recompute_sees_the_same_dropout() {
    let bytes = fs::read(golden().join("lora-gradients.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    for device in devices() {
        let (base, decoder) = decoder("tiny-gqa", &device);
        let modules = base.config.linear_modules();
        let adapter = Adapter::load(&golden().join("adapter-gqa"), &modules, &device).unwrap();
        let batch = pack(&examples(&file, "gqa"));
        let run = |kept, step| {
            let key = DropoutKey { seed: 1, step, micro_batch: 0 };
            let dropout = Some(Dropout { p: 0.3, key });
            loss_and_gradients(&decoder, &adapter, &batch, 1, kept, dropout)
        };
        let (kept, again) = (run(usize::MAX, 0), run(0, 0));
        // Backends may fuse an operation where no graph is recorded: equal but for rounding.
        assert!((loss(&kept) / loss(&again) - 1.0).abs() < 1e-6);
        for (name, pair) in &kept.gradients.pairs {
            let reference: Vec<f32> = pair.a.try_to_vec_as().unwrap();
            let error = relative_error(&again.gradients.pairs[name].a, &reference);
            assert!(error < 1e-5, "{device:?} {name}: {error}");
        }
        let other = run(usize::MAX, 1);
        assert!((loss(&kept) / loss(&other) - 1.0).abs() > 1e-3, "another step has another mask");
    }
}

#[test]
fn below_the_lowest_adapter_nothing_has_a_gradient() {
    for device in devices() {
        let (base, decoder) = decoder("tiny-gqa", &device);
        let target = "model.layers.1.mlp.down_proj".to_owned();
        let config = LoraConfig {
            target_modules: TargetModules::Names(vec![target.clone()]),
            ..LoraConfig::default()
        };
        let adapter = Adapter::init(&config, &base.config.linear_modules(), 0, &device).unwrap();
        let example =
            TokenizedExample { token_ids: vec![5, 6, 7, 8], loss_mask: vec![false, true, true, true] };
        for kept in [usize::MAX, 0, 1] {
            let micro =
                loss_and_gradients(&decoder, &adapter, &pack(std::slice::from_ref(&example)), 3, kept, None);
            assert_eq!(micro.gradients.pairs.keys().collect::<Vec<_>>(), [&target]);
            // B is zero, so A's gradient is too; B's is not.
            let b: Vec<f32> = micro.gradients.pairs[&target].b.try_to_vec_as().unwrap();
            assert!(b.iter().any(|&x| x != 0.0));
        }
    }
}
