//! Adapters out of tuned models.
#![allow(clippy::unwrap_used)] // a test reports by panicking

mod tiny;

use pronk_export::{Dtype, ExportError, MergeOptions, extract};
use pronk_lora::{LoraConfig, TargetModules};
use pronk_model::Base;
use tempfile::TempDir;
use tiny::{base, device, options, peft, plain, values_of};

fn config(rank: usize, targets: &[&str]) -> LoraConfig {
    let target_modules = TargetModules::Names(targets.iter().map(|&name| name.into()).collect());
    LoraConfig { rank, alpha: 2.0 * rank as f64, target_modules, ..LoraConfig::default() }
}

/// Of a merged adapter of rank 4 comes an adapter of rank 4 that is the same update, and of rank 2 one that
/// keeps a part.
#[test]
fn a_merged_adapter_is_found_again() {
    let (dir, base) = (TempDir::new().unwrap(), base("gqa"));
    let adapter = peft("gqa", &base);
    let out = dir.path().join("merged");
    plain(&base, &adapter, &out, &MergeOptions { dtype: Some(Dtype::F32), ..options() }).unwrap();
    let tuned = Base::open(&out).unwrap();
    let all = LoraConfig { target_modules: adapter.config.target_modules.clone(), ..config(4, &[]) };
    let found = extract(&base, &tuned, &all, 1, &device(), |_, _| {}).unwrap();
    assert_eq!((found.layers.len(), found.left_out.len()), (14, 0));
    assert!(found.kept() > 1.0 - 1e-6, "{}", found.kept());
    for (name, pair) in &found.adapter.pairs {
        assert_eq!((pair.rank(), pair.scale), (4, 2.0), "{name}");
        let (ours, theirs) = (values_of(pair), values_of(&adapter.pairs[name]));
        let largest = theirs.iter().fold(0.0_f32, |top, x| top.max(x.abs()));
        let off = ours.iter().zip(&theirs).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
        assert!(off < 1e-4 * largest, "{name}: {off} of {largest}");
    }
    let part = extract(&base, &tuned, &config(2, &["q_proj"]), 1, &device(), |_, _| {}).unwrap();
    assert!(part.kept() > 0.3 && part.kept() < 0.99, "{}", part.kept());
    assert_eq!(part.left_out.len(), 12);
    assert!(part.left_out.contains(&"model.layers.0.mlp.down_proj.weight".to_owned()));
}

#[test]
fn models_that_do_not_belong_together_are_refused() {
    let (gqa, other) = (base("gqa"), base("head-dim"));
    let extracted = |tuned: &Base| {
        extract(&gqa, tuned, &config(4, &["q_proj"]), 1, &device(), |_, _| {}).map(|_| ()).unwrap_err()
    };
    assert!(matches!(extracted(&other), ExportError::DoesNotFit { .. }));
    assert!(extracted(&gqa).to_string().contains("a targeted layer that differs"));
}
