//! `DoRA` over bases of every kind: what it starts from, and what its norms are norms of.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test reports by panicking

#[allow(dead_code)] // what it shares is more than this test takes
mod golden;

use std::ops::ControlFlow;

use burn::tensor::{Device, Tensor, TensorData};
use golden::{assert_close, devices, workspace};
use pronk_kernels::Precision;
use pronk_lora::{Adapter, ForwardMode, LoraConfig, LoraError, TargetModules};
use pronk_model::{Base, Decoder, LoadConfig, Residency, Scheme, quantized};
use tempfile::TempDir;

const IDS: [u32; 9] = [1, 40, 17, 35, 12, 55, 36, 19, 4];

fn open(name: &str) -> Base {
    Base::open(&workspace("tests/golden").join(name)).unwrap()
}

fn config(targets: &[&str]) -> LoraConfig {
    let target_modules = TargetModules::Names(targets.iter().map(|&name| name.into()).collect());
    LoraConfig { rank: 3, use_dora: true, target_modules, ..LoraConfig::default() }
}

fn decoder(base: &Base, device: &Device, weights: Residency) -> Decoder {
    let config = LoadConfig { precision: Precision::F32, weights };
    Decoder::load(base, device, config, |_, _| ()).unwrap()
}

fn logits(decoder: &Decoder, adapter: Option<&Adapter>) -> Vec<f32> {
    decoder.logits(&IDS, ForwardMode::inference(adapter)).try_to_vec_as().unwrap()
}

/// Numbers of a wave that depends on `seed`.
fn wave(shape: [usize; 2], seed: usize, device: &Device) -> Tensor<2> {
    let values = (0..shape[0] * shape[1]).map(|i| 0.3 * ((i * 7 + seed * 13) as f32 * 0.7).sin());
    Tensor::from_data(TensorData::new(values.collect::<Vec<f32>>(), shape), device)
}

/// Biased, packed, quantized, streamed: a fresh adapter is the base, and one whose magnitudes are the
/// norms of the updated weight's rows is the same update without magnitudes.
#[test]
fn magnitudes_are_norms_of_rows() {
    let cache = TempDir::new().unwrap();
    let small = |scheme| {
        quantized(&open("tiny-gqa"), scheme, cache.path(), |_, _| ControlFlow::Continue(())).unwrap().base
    };
    let bases = [
        (open("tiny-bias"), ["q_proj", "o_proj", "down_proj"]),
        (open("tiny-phi3"), ["qkv_proj", "gate_up_proj", "down_proj"]),
        (small(Scheme::Nf4), ["q_proj", "o_proj", "down_proj"]),
        (small(Scheme::Int8), ["k_proj", "up_proj", "down_proj"]),
    ];
    for (base, targets) in &bases {
        for (_, device) in devices() {
            for weights in [Residency::Resident, Residency::Streamed] {
                let decoder = decoder(base, &device, weights);
                let mut adapter = decoder.new_adapter(&config(targets), 5).unwrap();
                let alone = logits(&decoder, None);
                assert_close("a fresh adapter", &logits(&decoder, Some(&adapter)), &alone, 1e-5);

                for (seed, pair) in adapter.pairs.values_mut().enumerate() {
                    pair.b = wave(pair.b.dims(), seed, &device);
                }
                let longer = logits(&decoder, Some(&adapter));
                decoder.set_magnitudes(&mut adapter);
                let found = logits(&decoder, Some(&adapter));
                for pair in adapter.pairs.values_mut() {
                    pair.magnitude = None;
                }
                let expected = logits(&decoder, Some(&adapter));
                assert_close("rows as long as they are", &found, &expected, 1e-5);
                let moved = longer.iter().zip(&expected).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
                assert!(moved > 1e-2, "the base's norms and those of the update differ: {moved}");
            }
        }
    }
}

#[test]
fn parts_of_packed_layers_have_no_magnitudes() {
    let base = open("tiny-phi3");
    let decoder = decoder(&base, &devices()[0].1, Residency::Resident);
    let error = decoder.new_adapter(&config(&["q_proj", "down_proj"]), 1).unwrap_err();
    assert!(matches!(&error, LoraError::Config { knob: "use_dora", .. }));
    let error = error.to_string();
    assert!(error.contains("qkv_proj") && error.contains("found q_proj"), "{error}");
}
