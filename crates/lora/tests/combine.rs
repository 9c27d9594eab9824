//! Adapters combined: what their updates come to.
#![allow(clippy::unwrap_used)] // a test reports by panicking

use std::path::Path;

use burn::tensor::{Device, Tensor};
use pronk_kernels::open_device;
use pronk_lora::{Adapter, Combination, LoftQConfig, LoraPair};
use tempfile::TempDir;

fn device() -> Device {
    open_device("auto").unwrap()
}

fn golden(name: &str) -> Adapter {
    let dir =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(format!("adapter-{name}"));
    Adapter::load_alone(&dir, &device()).unwrap()
}

fn host(tensor: &Tensor<2>) -> Vec<f32> {
    tensor.try_to_vec_as().unwrap()
}

fn update(pair: &LoraPair) -> Tensor<2> {
    pair.b.clone().matmul(pair.a.clone()) * pair.scale
}

fn assert_close(found: &[f32], expected: &[f32], what: &str) {
    let largest = expected.iter().fold(0.0_f32, |top, x| top.max(x.abs()));
    let off = found.iter().zip(expected).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    assert!(found.len() == expected.len() && off < 1e-5 * largest, "{what}: {off} of {largest}");
}

/// The four adapters differ in rank, scale, modules and layers.
#[test]
fn concatenated_adapters_are_the_weighted_sum_of_their_updates() {
    let parts = [("gqa", 0.7), ("patterns", 0.3), ("rslora", -0.5)].map(|(name, w)| (golden(name), w));
    let weighted: Vec<(&Adapter, f64)> = parts.iter().map(|(adapter, w)| (adapter, *w)).collect();
    let combined = Adapter::combine(&weighted, Combination::Cat).unwrap();
    assert_eq!(combined.pairs.len(), 14);
    for (name, pair) in &combined.pairs {
        let of = parts.iter().filter_map(|(adapter, w)| Some(update(adapter.pairs.get(name)?) * *w));
        let expected = of.reduce(|sum, part| sum + part).unwrap();
        assert_close(&host(&update(pair)), &host(&expected), name);
        let ranks = parts.iter().filter_map(|(adapter, _)| Some(adapter.pairs.get(name)?.rank()));
        assert_eq!(pair.rank(), ranks.sum::<usize>(), "{name}");
    }

    let dir = TempDir::new().unwrap();
    combined.save(dir.path(), "base", false).unwrap();
    let again = Adapter::load_alone(dir.path(), &device()).unwrap();
    for (name, pair) in &combined.pairs {
        assert_close(&host(&update(&again.pairs[name])), &host(&update(pair)), name);
    }
}

#[test]
fn summed_factors_keep_the_rank() {
    let gqa = golden("gqa");
    let half = Adapter::combine(&[(&gqa, 0.25), (&gqa, 0.25)], Combination::Linear).unwrap();
    for (name, pair) in &half.pairs {
        // Both A and B are twice the root of a quarter: the update is the adapter's own.
        assert_eq!(pair.rank(), 4);
        assert_close(&host(&update(pair)), &host(&update(&gqa.pairs[name])), name);
    }
    let less = Adapter::combine(&[(&gqa, -2.0)], Combination::Linear).unwrap();
    for (name, pair) in &less.pairs {
        assert_close(&host(&update(pair)), &host(&(update(&gqa.pairs[name]) * -2.0)), name);
    }
}

#[test]
fn what_does_not_fit_together_is_told() {
    let (gqa, rslora, dora) = (golden("gqa"), golden("rslora"), golden("dora"));
    let told = |parts: &[(&Adapter, f64)], how| Adapter::combine(parts, how).unwrap_err().to_string();
    let error = told(&[(&gqa, 1.0), (&rslora, 1.0)], Combination::Linear);
    assert!(error.contains("q_proj: expected one rank, found {4, 8}; take the method cat"), "{error}");
    assert!(told(&[(&dora, 1.0)], Combination::Cat).contains("magnitudes of DoRA"));
    assert!(told(&[(&gqa, f64::NAN)], Combination::Cat).contains("found NaN"));
    let mut narrow = gqa.clone();
    for pair in narrow.pairs.values_mut() {
        pair.a = pair.a.clone().slice([0..4, 0..16]);
    }
    assert!(told(&[(&gqa, 1.0), (&narrow, 1.0)], Combination::Cat).contains("inputs and outputs differ"));
}

#[test]
fn norms_are_those_of_the_updates() {
    let mut adapter = golden("dora");
    let first = adapter.pairs.keys().next().unwrap().clone();
    let summary = adapter.summary().unwrap();
    assert_eq!(summary.len(), 4);
    for module in &summary {
        let pair = &adapter.pairs[&module.name];
        let norm = host(&update(pair)).iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        assert!((module.norm / norm - 1.0).abs() < 1e-5, "{module:?}: {norm}");
        let parameters: usize = pair.tensors().map(|(_, tensor)| tensor.shape().num_elements()).sum();
        assert_eq!((module.rank, module.parameters, module.finite), (2, parameters, true));
    }
    assert_eq!(summary.iter().map(|module| module.parameters).sum::<usize>(), adapter.parameters());
    let pair = adapter.pairs.get_mut(&first).unwrap();
    pair.magnitude = pair.magnitude.clone().map(|magnitude| magnitude * f32::NAN);
    assert!(!adapter.summary().unwrap()[0].finite);
}

#[test]
fn what_is_trained_whole_does_not_add_up() {
    let [plain, saved, biases] = ["gqa", "saved", "bias-all"].map(golden);
    for (whole, named) in [(&saved, "lm_head.weight"), (&biases, "k_proj.bias")] {
        let refused =
            Adapter::combine(&[(&plain, 1.0), (whole, 1.0)], Combination::Cat).unwrap_err().to_string();
        assert!(refused.contains(named) && refused.contains("pronk merge"), "{refused}");
    }
}

/// Each makes up for what the base has lost: their mean does so once, their sum twice.
#[test]
fn starts_from_what_was_lost_add_up_with_their_like() {
    let mut lost = golden("gqa");
    lost.config.loftq_config = Some(LoftQConfig { loftq_bits: 4, loftq_iter: 1, skip_modules: Vec::new() });
    let plain = golden("gqa");
    let combined =
        |parts: &[(&Adapter, f64)]| Adapter::combine(parts, Combination::Cat).map_err(|e| e.to_string());
    assert!(combined(&[(&lost, 0.5), (&plain, 0.5)]).unwrap_err().contains("others do not"));
    assert!(combined(&[(&plain, 0.5), (&lost, 0.5)]).unwrap_err().contains("others do not"));
    assert!(combined(&[(&lost, 1.0), (&lost, 1.0)]).unwrap_err().contains("add up to 1, found 2"));
    let linear =
        Adapter::combine(&[(&lost, 0.7), (&lost, 0.3)], Combination::Linear).unwrap_err().to_string();
    assert!(linear.contains("take the method cat"), "{linear}");
    assert_eq!(
        combined(&[(&lost, 0.7), (&lost, 0.3)]).unwrap().config.loftq_config,
        lost.config.loftq_config
    );
}
