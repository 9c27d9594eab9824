//! mlx-lm's layout: factors that multiply from the right, one rank and one scale for all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use burn::tensor::Device;
use pronk_lora::{ADAPTER_CONFIG, Adapter};
use pronk_model::{Base, Staging};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use super::{HostPair, adapter_of};
use crate::ExportError;

const WEIGHTS: &str = "adapters.safetensors";
const A: &str = ".lora_a";
const B: &str = ".lora_b";
const MAGNITUDE: &str = ".m";

pub fn write(
    base: &Base,
    dropout: f64,
    mut pairs: Vec<HostPair>,
    staging: &Staging,
) -> Result<Vec<&'static str>, ExportError> {
    let rank = pairs.iter().map(|pair| pair.rank).max().unwrap_or(1);
    let first = pairs.first().map_or(1.0, |pair| pair.scale);
    if pairs.iter().any(|pair| (pair.scale - first).abs() > 1e-9 * first) {
        pairs = pairs.into_iter().map(HostPair::folded).collect();
    }
    let scale = pairs.first().map_or(1.0, |pair| pair.scale);
    let keys: BTreeSet<&str> = pairs.iter().map(|pair| within_block(&pair.module)).collect();
    let is_dora = pairs.iter().any(|pair| pair.magnitude.is_some());
    let config = json!({
        "fine_tune_type": if is_dora { "dora" } else { "lora" },
        "num_layers": base.config.num_hidden_layers,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": dropout, "keys": keys},
    });
    staging.add_file(ADAPTER_CONFIG, format!("{config:#}\n").as_bytes())?;

    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    for pair in &pairs {
        let rows = pair.out_features();
        let (a, mut b) = (transposed(&pair.a, pair.rank, rank), transposed(&pair.b, rows, rows));
        b.resize(rank * rows, 0.0);
        tensors.insert(format!("{}{A}", pair.module), (vec![pair.in_features(), rank], bytes(&a)));
        tensors.insert(format!("{}{B}", pair.module), (vec![rank, rows], bytes(&b)));
        if let Some(magnitude) = &pair.magnitude {
            tensors.insert(format!("{}{MAGNITUDE}", pair.module), (vec![rows], bytes(magnitude)));
        }
    }
    let unwritten = |e: safetensors::SafeTensorError| ExportError::Malformed {
        path: staging.destination().join(WEIGHTS),
        problem: e.to_string(),
    };
    let views: Result<Vec<_>, _> = tensors
        .iter()
        .map(|(name, (shape, data))| Ok((name, TensorView::new(Dtype::F32, shape.clone(), data)?)))
        .collect();
    let file = views.and_then(|views| safetensors::serialize(views, None)).map_err(unwritten)?;
    staging.add_file(WEIGHTS, &file)?;
    Ok(vec![ADAPTER_CONFIG, WEIGHTS])
}

/// A module's name within its block, which is how mlx-lm names what is adapted.
fn within_block(module: &str) -> &str {
    let rest = module.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
    rest.map_or(module, |(_, name)| name)
}

/// `[rows, columns]` becomes `[columns, wide]`, what is new being zero.
fn transposed(matrix: &[f32], rows: usize, wide: usize) -> Vec<f32> {
    let columns = matrix.len() / rows;
    let mut out = vec![0.0; columns * wide];
    for (row, values) in matrix.chunks_exact(columns).enumerate() {
        for (column, value) in values.iter().enumerate() {
            out[column * wide + row] = *value;
        }
    }
    out
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

pub fn read(dir: &Path, device: &Device) -> Result<Adapter, ExportError> {
    let read = |name: &str| {
        let path = dir.join(name);
        fs::read(&path).map_err(ExportError::io(&path))
    };
    let malformed = |name: &str, problem: String| ExportError::Malformed { path: dir.join(name), problem };
    let config: Value = serde_json::from_slice(&read(ADAPTER_CONFIG)?)
        .map_err(|e| malformed(ADAPTER_CONFIG, e.to_string()))?;
    let scale = config["lora_parameters"]["scale"].as_f64();
    let scale = scale.ok_or_else(|| malformed(ADAPTER_CONFIG, "scale: expected a number".to_owned()))?;
    let bytes = read(WEIGHTS)?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| malformed(WEIGHTS, e.to_string()))?;
    let mut pairs = Vec::new();
    for (name, a) in file.tensors() {
        let Some(module) = name.strip_suffix(A) else { continue };
        let b = file.tensor(&format!("{module}{B}")).map_err(|e| malformed(WEIGHTS, e.to_string()))?;
        let &[rank, _] = b.shape() else {
            return Err(malformed(WEIGHTS, format!("{module}{B}: expected a matrix")));
        };
        let (columns, rows) =
            (a.shape().first().copied().unwrap_or(0), b.shape().last().copied().unwrap_or(0));
        if rank == 0 || columns == 0 || rows == 0 || a.shape().len() != 2 || a.shape().last() != Some(&rank) {
            return Err(malformed(WEIGHTS, format!("{module}: the two factors do not fit each other")));
        }
        pairs.push(HostPair {
            module: module.to_owned(),
            rank,
            scale,
            // Transposing is its own inverse: [in, rank] to [rank, in], [rank, out] to [out, rank].
            a: transposed(&floats(a.data()), columns, columns),
            b: transposed(&floats(b.data()), rank, rank),
            magnitude: file.tensor(&format!("{module}{MAGNITUDE}")).ok().map(|m| floats(m.data())),
        });
    }
    Ok(adapter_of(pairs, device))
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_turned_and_filled_up() {
        let a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]; // [rank 2, 3]
        assert_eq!(transposed(&a, 2, 2), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
        assert_eq!(transposed(&a, 2, 3), [1.0, 4.0, 0.0, 2.0, 5.0, 0.0, 3.0, 6.0, 0.0]);
        assert_eq!(within_block("model.layers.11.self_attn.q_proj"), "self_attn.q_proj");
    }
}
