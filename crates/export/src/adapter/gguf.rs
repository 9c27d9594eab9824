//! llama.cpp's layout: one GGUF file.

use std::path::Path;

use burn::tensor::Device;
use pronk_kernels::Format;
use pronk_lora::Adapter;
use pronk_model::{Base, GgufAdapter, GgufPair, GgufTensor, GgufValue, GgufWriter, Staging};

use super::{HostPair, adapter_of};
use crate::ExportError;

/// The one file.
pub const FILE: &str = "adapter.gguf";

pub fn write(base: &Base, pairs: &[HostPair], staging: &Staging) -> Result<Vec<&'static str>, ExportError> {
    let arch = base.config.gguf_architecture();
    let alpha = alpha(pairs);
    let text = |value: &str| GgufValue::String(value.to_owned());
    let metadata = [
        ("general.architecture", text(arch)),
        ("general.type", text("adapter")),
        ("general.file_type", GgufValue::U32(0)),
        ("adapter.type", text("lora")),
        // 0 stands for a scale of 1, whatever the rank.
        ("adapter.lora.alpha", GgufValue::F32(alpha.unwrap_or(0.0) as f32)),
    ]
    .map(|(key, value)| (key.to_owned(), value));
    let mut tensors = Vec::with_capacity(2 * pairs.len());
    for pair in pairs {
        let [a, b] = names(base, &pair.module)?;
        let tensor = |name, shape| GgufTensor { name, shape, format: Format::F32 };
        tensors.push(tensor(a, vec![pair.rank, pair.in_features()]));
        tensors.push(tensor(b, vec![pair.out_features(), pair.rank]));
    }
    let mut writer = GgufWriter::create(staging, FILE, &metadata, tensors)?;
    for pair in pairs {
        let [a, b] = names(base, &pair.module)?;
        let factor = if alpha.is_some() { 1.0 } else { pair.scale };
        let scaled = pair.b.iter().map(|x| (f64::from(*x) * factor) as f32).collect();
        writer.write(&a, &pair.a)?;
        writer.write(&b, &base.config.rows_to_gguf(&pair.module, pair.out_features(), scaled))?;
    }
    writer.finish()?;
    Ok(vec![FILE])
}

/// The one alpha that says every pair's scale as alpha / rank; a whole number, because Ollama takes no other.
fn alpha(pairs: &[HostPair]) -> Option<f64> {
    let alpha = |pair: &HostPair| pair.scale * pair.rank as f64;
    let first = pairs.first().map(alpha)?.round();
    let same = |pair: &HostPair| (alpha(pair) - first).abs() < 1e-9 * first;
    (first > 0.0 && pairs.iter().all(same)).then_some(first)
}

fn names(base: &Base, module: &str) -> Result<[String; 2], ExportError> {
    GgufAdapter::names(&base.config, module).ok_or_else(|| ExportError::Malformed {
        path: base.path.clone(),
        problem: format!("{module}: llama.cpp has no such tensor"),
    })
}

pub fn read(base: &Base, dir: &Path, device: &Device) -> Result<Adapter, ExportError> {
    let GgufAdapter { alpha, pairs } = GgufAdapter::open(&dir.join(FILE), &base.config)?;
    let pair = |(module, GgufPair { rank, a, b }): (String, GgufPair)| {
        let scale = if alpha == 0.0 { 1.0 } else { alpha / rank as f64 };
        HostPair { module, rank, scale, a, b, magnitude: None }
    };
    Ok(adapter_of(pairs.into_iter().map(pair).collect(), device))
}
