//! Bases, adapters and checkpoints.

use std::path::Path;
use std::sync::LazyLock;

use burn::tensor::Device;
use pronk_lora::Adapter;
use pronk_model::{Base, DecoderConfig, GgufAdapter};
use pronk_train::{Checkpoint, OptimizerKind, TrainConfig};

use crate::folder::Folder;

/// What the inputs in `corpus/` are of.
const CONFIG: &[u8] = include_bytes!("config.json");

static TINY: LazyLock<DecoderConfig> =
    LazyLock::new(|| DecoderConfig::from_json(CONFIG).expect("a whole configuration"));
static CPU: LazyLock<Device> = LazyLock::new(|| pronk_kernels::open_device("cpu").expect("a processor"));

/// A Hugging Face directory; without a `config.json` of its own, with ours.
fn hugging_face(bytes: &[u8], names: &[&str]) {
    let folder = Folder::of(bytes, names);
    if !folder.path().join("config.json").exists() {
        folder.write("config.json", CONFIG);
    }
    base(folder.path());
}

pub fn safetensors(bytes: &[u8]) {
    let names = [
        "config.json",
        "model.safetensors.index.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ];
    hugging_face(bytes, &names);
}

pub fn pytorch(bytes: &[u8]) {
    hugging_face(bytes, &["config.json", "pytorch_model.bin.index.json", "pytorch_model.bin"]);
}

pub fn gguf(bytes: &[u8]) {
    base(&Folder::new().write("base.gguf", bytes));
}

/// All that is read of a base, but its numbers into a decoder.
fn base(path: &Path) {
    let Ok(base) = Base::open(path) else { return };
    for (name, shape) in base.shapes() {
        if let Ok(tensor) = base.read(&name) {
            assert_eq!(tensor.shape, shape, "{name}");
            assert_eq!(tensor.to_f32().len(), shape.iter().product::<usize>(), "{name}");
        }
        let _ = base.dtype_of(&name);
        let _ = base.matrix(&name);
    }
    let _ = (base.quantization(), base.note(), base.dtype(), base.shards(1 << 20, 2));
    let _ = base.fingerprint();
    described(&base.config);
    if let Some(file) = base.gguf() {
        for (key, _) in file.metadata() {
            let _ = (file.text(&key), file.number(&key), file.texts(&key), file.numbers(&key));
        }
    }
}

pub fn config(bytes: &[u8]) {
    if let Ok(config) = DecoderConfig::from_json(bytes) {
        described(&config);
    }
}

fn described(config: &DecoderConfig) {
    let _ = (config.tensors(), config.linear_modules(), config.adapter_modules());
    let _ = (config.to_gguf(), config.attention_widths());
}

pub fn gguf_adapter(bytes: &[u8]) {
    let folder = Folder::new();
    let _ = GgufAdapter::open(&folder.write("adapter.gguf", bytes), &TINY);
}

pub fn adapter(bytes: &[u8]) {
    let folder = Folder::of(bytes, &[pronk_lora::ADAPTER_CONFIG, pronk_lora::ADAPTER_WEIGHTS]);
    let _ = pronk_lora::base_of(folder.path());
    let fitting = Adapter::load(folder.path(), &TINY.adapter_modules(), &CPU);
    let alone = Adapter::load_alone(folder.path(), &CPU);
    for adapter in fitting.into_iter().chain(alone) {
        let _ = adapter.summary();
    }
}

/// One of a run's, whatever its manifest says of it.
pub fn checkpoint(bytes: &[u8]) {
    is_whole_checkpoint(bytes);
}

/// Whether an optimizer goes on from it.
pub fn is_whole_checkpoint(bytes: &[u8]) -> bool {
    let names = [
        pronk_lora::ADAPTER_CONFIG,
        pronk_lora::ADAPTER_WEIGHTS,
        "trainer_state.json",
        "optimizer.safetensors",
        "manifest.json",
    ];
    let folder = Folder::of(bytes, &names);
    let _ = pronk_train::verify(folder.path());
    let read = [OptimizerKind::AdamW, OptimizerKind::AdamW8bit].map(|optimizer| {
        let config = TrainConfig { optimizer, ..TrainConfig::default() };
        Checkpoint::load(folder.path(), &TINY.adapter_modules(), &config, &CPU)
    });
    read.iter().any(Result::is_ok)
}
