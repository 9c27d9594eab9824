//! The tiny random Llamas of `tests/golden`, and adapters over them.
#![allow(dead_code)] // each test file uses its part

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use pronk_export::{ExportError, MergeOptions, MergeReport, merge};
use pronk_lora::{Adapter, LoraConfig, LoraPair, TargetModules};
use pronk_model::Base;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// A text in a tiny vocabulary: `<s>` and some bytes.
pub const PROMPT: [u32; 12] = [1, 40, 77, 105, 112, 115, 36, 119, 121, 105, 4, 259];

pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

pub fn base(variant: &str) -> Base {
    Base::open(&golden(&format!("tiny-{variant}"))).unwrap()
}

pub fn device() -> Device {
    pronk_kernels::open_device("cpu").unwrap()
}

/// PEFT's adapter of that name.
pub fn peft(name: &str, base: &Base) -> Adapter {
    Adapter::load(&golden(&format!("adapter-{name}")), &base.config.linear_modules(), &device()).unwrap()
}

/// An adapter on the linears called `targets`, its B filled with numbers up to `size`.
pub fn random(base: &Base, targets: &[&str], size: f32) -> Adapter {
    let config = LoraConfig {
        rank: 4,
        alpha: 8.0,
        target_modules: TargetModules::Names(targets.iter().map(|&t| t.into()).collect()),
        ..LoraConfig::default()
    };
    let mut adapter = Adapter::init(&config, &base.config.adapter_modules(), 7, &device()).unwrap();
    for pair in adapter.pairs.values_mut() {
        let [rows, rank] = pair.b.dims();
        let values: Vec<f32> = (0..rows * rank).map(|i| size * (i as f32 * 1.7).sin()).collect();
        pair.b = Tensor::from_data(TensorData::new(values, [rows, rank]), &device());
    }
    adapter
}

/// `scale * B A`.
pub fn values_of(pair: &LoraPair) -> Vec<f32> {
    (pair.b.clone().matmul(pair.a.clone()) * pair.scale).try_to_vec_as().unwrap()
}

pub fn options() -> MergeOptions {
    MergeOptions { prompt: PROMPT.to_vec(), ..MergeOptions::default() }
}

/// A merge whose caller adds nothing.
pub fn plain(
    base: &Base,
    adapter: &Adapter,
    out: &Path,
    options: &MergeOptions,
) -> Result<MergeReport, ExportError> {
    merge(base, adapter, out, options, &device(), &mut |_, _| {}, &mut |_| Ok(()))
}

/// Format, shape and bytes of every tensor of a file.
pub fn tensors(file: &Path) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(file).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let owned = |(name, view): (String, safetensors::tensor::TensorView)| {
        (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
    };
    file.tensors().into_iter().map(owned).collect()
}

pub fn json(file: &Path) -> Value {
    serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
}

/// Names of all that lies in `dir`, hidden or not, sorted.
pub fn listing(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A copy of a tiny base, to be changed.
pub fn copy(variant: &str, to: &Path) {
    fs::create_dir_all(to).unwrap();
    let from = golden(&format!("tiny-{variant}"));
    for name in listing(&from).iter().filter(|name| *name != "expected.safetensors") {
        fs::copy(from.join(name), to.join(name)).unwrap();
    }
}
