//! Adapters that start from singular values, over bases of every kind.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test reports by panicking

#[allow(dead_code)] // what it shares is more than this test takes
mod golden;

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use burn::tensor::{Device, Tensor, TensorData};
use golden::{assert_close, devices, workspace};
use pronk_kernels::Precision;
use pronk_lora::{
    Adapter, ForwardMode, InitLoraWeights, LayerInputs, LoftQConfig, LoraConfig, LoraError, TargetModules,
    low_rank_factors,
};
use pronk_model::{
    Base, Decoder, LoadConfig, ModelError, Quantization, Residency, Scheme, StartWeights, quantized,
};
use tempfile::TempDir;

const IDS: [u32; 9] = [1, 40, 17, 35, 12, 55, 36, 19, 4];

fn open(name: &str) -> Base {
    Base::open(&workspace("tests/golden").join(name)).unwrap()
}

fn small(name: &str, scheme: Scheme, cache: &TempDir) -> Base {
    quantized(&open(name), scheme, cache.path(), |_, _| ControlFlow::Continue(())).unwrap().base
}

fn config(init: InitLoraWeights, targets: &[&str]) -> LoraConfig {
    let target_modules = TargetModules::Names(targets.iter().map(|&name| name.into()).collect());
    LoraConfig { rank: 3, alpha: 5.0, init_lora_weights: init, target_modules, ..LoraConfig::default() }
}

fn decoder(base: &Base, device: &Device, weights: Residency) -> Decoder {
    let config = LoadConfig { precision: Precision::F32, weights };
    Decoder::load(base, device, config, |_, _| ()).unwrap()
}

fn logits(decoder: &Decoder, adapter: Option<&Adapter>) -> Vec<f32> {
    decoder.logits(&IDS, ForwardMode::inference(adapter)).try_to_vec_as().unwrap()
}

fn weight(base: &Base, name: &str, device: &Device) -> Tensor<2> {
    let found = base.read(&format!("{name}.weight")).unwrap();
    Tensor::from_data(TensorData::new(found.to_f32(), found.shape.clone()), device)
}

fn square(x: Tensor<2>) -> f32 {
    x.square().sum().into_scalar()
}

/// Biased, packed and its parts, quantized, llama.cpp's, streamed: with the start taken away it is the base, and
/// after training what is saved computes over the base as it is what was trained.
#[test]
fn a_principal_start_is_the_base_and_its_standalone_form_is_the_update() {
    let cache = TempDir::new().unwrap();
    let bases = [
        (open("tiny-bias"), ["q_proj", "o_proj", "down_proj"]),
        (open("tiny-phi3"), ["k_proj", "gate_up_proj", "down_proj"]),
        (small("tiny-gqa", Scheme::Nf4, &cache), ["q_proj", "o_proj", "down_proj"]),
        (small("tiny-gqa", Scheme::Int8, &cache), ["k_proj", "up_proj", "down_proj"]),
    ];
    for (base, targets) in &bases {
        for (name, device) in devices() {
            for weights in [Residency::Resident, Residency::Streamed] {
                let decoder = decoder(base, &device, weights);
                let config = config(InitLoraWeights::Pissa(None), targets);
                let weights = StartWeights { base, original: None, records: &[] };
                let mut adapter = decoder.started_adapter(&config, weights, 5, |_, _| ()).unwrap();
                let alone = logits(&decoder, None);
                assert_close("a fresh adapter", &logits(&decoder, Some(&adapter)), &alone, 1e-5);
                for pair in adapter.pairs.values_mut() {
                    assert!(square(pair.b.clone()) > 0.0);
                    pair.a = pair.a.clone() * 1.3;
                    pair.b = pair.b.clone() * 1.2;
                }
                let trained = logits(&decoder, Some(&adapter));
                let moved = trained.iter().zip(&alone).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
                assert!(moved > 1e-2, "{name}: {moved}");
                let standalone = adapter.standalone();
                assert!(standalone.pairs.values().all(|pair| pair.rank() == 6 && pair.fixed.is_none()));
                assert_close("standalone", &logits(&decoder, Some(&standalone)), &trained, 1e-5);
                let packed = adapter.onto_packed(&base.config.adapter_modules());
                assert_close("packed", &logits(&decoder, Some(&packed)), &trained, 1e-5);

                let dir = TempDir::new().unwrap();
                adapter.save(dir.path(), "base", false).unwrap();
                let modules = base.config.adapter_modules();
                let again = Adapter::load(dir.path(), &modules, &device).unwrap();
                let again =
                    again.with_fixed(&adapter.fixed_ranks(), adapter.config.clone(), &modules).unwrap();
                assert_eq!(logits(&decoder, Some(&again)), trained, "to the bit");
            }
        }
    }
}

#[test]
fn the_start_is_the_best_approximation_of_the_weight_or_of_what_it_lost() {
    let cache = TempDir::new().unwrap();
    let original = open("tiny-phi3");
    for (_, device) in devices() {
        for scheme in [Scheme::Nf4, Scheme::Int8] {
            let base = small("tiny-phi3", scheme, &cache);
            let decoder = decoder(&base, &device, Residency::Resident);
            let weights = StartWeights { base: &base, original: Some(&original), records: &[] };
            let start = |init| {
                let config = config(init, &["qkv_proj", "down_proj"]);
                decoder.started_adapter(&config, weights, 5, |_, _| ()).unwrap()
            };
            let principal = start(InitLoraWeights::Pissa(Some(4)));
            assert_eq!(principal.config.loftq_config, None);
            let loftq = start(InitLoraWeights::LoftQ);
            let bits = LoftQConfig { loftq_bits: scheme.bits(), loftq_iter: 1, skip_modules: Vec::new() };
            assert_eq!(loftq.config.loftq_config, Some(bits));
            for (name, pair) in &loftq.pairs {
                let (now, before) = (weight(&base, name, &device), weight(&original, name, &device));
                for (pair, matrix) in [(pair, before - now.clone()), (&principal.pairs[name], now)] {
                    let whole = square(matrix.clone());
                    let best = low_rank_factors(&matrix, 3, 9, 1, "best").energy.into_scalar::<f32>();
                    let update = pair.b.clone().matmul(pair.a.clone()) * pair.scale;
                    let left = square(matrix - update);
                    assert!((left - (whole - best)).abs() < 1e-4 * whole, "{name}: {left}, {whole} - {best}");
                    assert!(best > 0.1 * whole);
                }
            }
        }
    }
}

#[test]
fn what_was_not_quantized_starts_from_nothing() {
    let cache = TempDir::new().unwrap();
    let original = open("tiny-gqa");
    let skip_modules = vec!["down_proj".to_owned()];
    let quantization = Quantization { scheme: Scheme::Nf4, skip_modules: skip_modules.clone() };
    let proceed = |_, _| ControlFlow::Continue(());
    let base = quantized(&original, quantization, cache.path(), proceed).unwrap().base;
    let decoder = decoder(&base, &devices()[0].1, Residency::Resident);
    let weights = StartWeights { base: &base, original: Some(&original), records: &[] };
    let config = config(InitLoraWeights::LoftQ, &["up_proj", "down_proj"]);
    let adapter = decoder.started_adapter(&config, weights, 5, |_, _| ()).unwrap();
    let bits = LoftQConfig { loftq_bits: 4, loftq_iter: 1, skip_modules };
    assert_eq!(adapter.config.loftq_config, Some(bits));
    for (name, pair) in &adapter.pairs {
        assert_eq!(square(pair.b.clone()) == 0.0, name.ends_with("down_proj"), "{name}");
    }
}

/// Over the inputs of every layer, packed ones and their parts included, in blocks that are reached one by one.
#[test]
fn qera_starts_from_what_the_outputs_of_quantized_layers_miss_most() {
    let cache = TempDir::new().unwrap();
    let original = open("tiny-phi3");
    let base = small("tiny-phi3", Scheme::Nf4, &cache);
    let records = [IDS.to_vec(), IDS.iter().rev().copied().collect(), vec![3; 5], (1..60).collect()];
    for (_, device) in devices() {
        let decoder = decoder(&base, &device, Residency::Resident);
        let weights = StartWeights { base: &base, original: Some(&original), records: &records };
        let config = config(InitLoraWeights::Qera, &["qkv_proj", "up_proj", "down_proj"]);
        let adapter = decoder.started_adapter(&config, weights, 5, |_, _| ()).unwrap();
        let bits = LoftQConfig { loftq_bits: 4, loftq_iter: 1, skip_modules: Vec::new() };
        assert_eq!(adapter.config.loftq_config, Some(bits));

        let before = self::decoder(&original, &device, Residency::Resident);
        let read: Vec<_> = records.iter().map(|ids| inputs(&before, ids)).collect();
        for module in original.config.adapter_modules() {
            let Some(pair) = adapter.pairs.get(&module.name) else { continue };
            let rows = module.part_of.as_ref().map_or(0..module.out_features, |part| part.rows.clone());
            let lost = weight(&original, module.layer(), &device) - weight(&base, module.layer(), &device);
            let lost = lost.slice([rows]);
            let x =
                Tensor::cat(read.iter().map(|read| read[module.layer()].clone()).collect(), 0).transpose();
            let missed = lost.clone().matmul(x.clone());
            let best = low_rank_factors(&missed, 3, 9, 1, "best").energy.into_scalar::<f32>();
            let whole = square(missed);
            let left = square((lost - pair.b.clone().matmul(pair.a.clone()) * pair.scale).matmul(x));
            // The products were rounded to bf16 where this processor multiplies it faster.
            let off = (left - (whole - best)).abs();
            assert!(off < 1e-2 * whole, "{}: {left}, {whole} - {best}", module.name);
            assert!(best > 0.1 * whole);
        }
    }
}

/// What is fixed is what QERA would start from; the adapter beside it is as fresh as over any base.
#[test]
fn what_a_base_has_lost_is_fixed_beside_a_fresh_adapter() {
    let cache = TempDir::new().unwrap();
    let original = open("tiny-phi3");
    let base = small("tiny-phi3", Scheme::Nf4, &cache);
    let modules = base.config.adapter_modules();
    let records = [IDS.to_vec(), (1..60).collect()];
    for (_, device) in devices() {
        let decoder = decoder(&base, &device, Residency::Resident);
        let weights = StartWeights { base: &base, original: Some(&original), records: &records };
        let targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"];
        let started = |init, rank, restore_rank| {
            let config = LoraConfig { rank, restore_rank, ..config(init, &targets) };
            decoder.started_adapter(&config, weights, 5, |_, _| ()).unwrap()
        };
        let of_product = |a: &Tensor<2>, b: &Tensor<2>, scale| b.clone().matmul(a.clone()) * scale;
        let restored = started(InitLoraWeights::Default, 2, 3);
        assert_eq!(restored.config.loftq_config.as_ref().unwrap().loftq_bits, 4);
        assert_eq!(restored.parameters(), decoder.new_adapter(&restored.config, 5).unwrap().parameters());
        let qera = started(InitLoraWeights::Qera, 3, 0);
        let fresh = Adapter::init(&restored.config, &modules, 5, &device).unwrap();
        for (name, pair) in &restored.pairs {
            let moved = pair.a.clone() - fresh.pairs[name].a.clone();
            assert!(square(pair.b.clone()) + square(moved) == 0.0, "{name}");
            let ([a, b], sought) = (pair.fixed.as_ref().unwrap().factors(), &qera.pairs[name]);
            let sought = of_product(&sought.a, &sought.b, sought.scale);
            let off = square(of_product(&a, &b, pair.scale) - sought.clone());
            assert!(off < 1e-8 * square(sought), "{name}: {off}");
        }
        let dir = TempDir::new().unwrap();
        let error = restored.save(dir.path(), "base", false).unwrap_err().to_string();
        assert!(error.contains("every B is zero"), "{error}");

        let mut all = started(InitLoraWeights::Gaussian, 2, 1000);
        let before = logits(&self::decoder(&original, &device, Residency::Resident), None);
        assert_close("all that was lost", &logits(&decoder, Some(&all)), &before, 2e-3);
        all.pairs.values_mut().for_each(|pair| pair.b = pair.b.clone() + 0.01);
        all.save(dir.path(), "base", false).unwrap();
        let loaded = Adapter::load(dir.path(), &modules, &device).unwrap();
        let trained = logits(&decoder, Some(&all));
        assert_close("in one", &logits(&decoder, Some(&loaded)), &trained, 1e-4);
        for (ranks, config) in [
            (BTreeMap::new(), all.config.clone()),
            (all.fixed_ranks(), LoraConfig { rank: 5, ..all.config.clone() }),
            (all.fixed_ranks(), LoraConfig { alpha: 6.0, ..all.config.clone() }),
            (all.fixed_ranks(), LoraConfig { use_dora: true, restore_rank: 0, ..all.config.clone() }),
        ] {
            let error = loaded.clone().with_fixed(&ranks, config, &modules).unwrap_err().to_string();
            assert!(error.contains("expected rank"), "{error}");
        }
        let fewer = TargetModules::Names(vec!["qkv_proj".into()]);
        let fewer = LoraConfig { target_modules: fewer, ..all.config.clone() };
        let error = loaded.clone().with_fixed(&all.fixed_ranks(), fewer, &modules).unwrap_err().to_string();
        assert!(error.contains("on other modules"), "{error}");
        let again = loaded.with_fixed(&all.fixed_ranks(), all.config.clone(), &modules).unwrap();
        assert_eq!(logits(&decoder, Some(&again)), trained, "to the bit");
    }
}

fn inputs(decoder: &Decoder, ids: &[u32]) -> BTreeMap<String, Tensor<2>> {
    let read = LayerInputs::default();
    decoder.logits(ids, ForwardMode { inputs: Some(&read), ..ForwardMode::inference(None) });
    read.take()
}

#[test]
fn ranks_above_the_weights_own_are_filled_with_zeros() {
    let base = open("tiny-gqa");
    let decoder = decoder(&base, &devices()[0].1, Residency::Resident);
    let config = LoraConfig { rank: 20, ..config(InitLoraWeights::Pissa(None), &["k_proj"]) };
    let weights = StartWeights { base: &base, original: None, records: &[] };
    let adapter = decoder.started_adapter(&config, weights, 5, |_, _| ()).unwrap();
    for (name, pair) in &adapter.pairs {
        assert_eq!((pair.a.dims(), pair.b.dims()), ([20, 32], [16, 20]));
        let off = weight(&base, name, &devices()[0].1) - pair.b.clone().matmul(pair.a.clone()) * pair.scale;
        assert!(square(off) < 1e-6);
    }
}

#[test]
fn what_was_not_quantized_has_lost_nothing() {
    let base = open("tiny-gqa");
    let decoder = decoder(&base, &devices()[0].1, Residency::Resident);
    let weights = StartWeights { base: &base, original: None, records: &[] };
    let config = config(InitLoraWeights::LoftQ, &["q_proj"]);
    let error = decoder.started_adapter(&config, weights, 1, |_, _| ()).unwrap_err();
    assert!(
        matches!(error, ModelError::Lora(LoraError::Config { knob: "init_lora_weights", .. })),
        "{error}"
    );
}
