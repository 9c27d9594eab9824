//! A low-rank adapter as llama.cpp reads it from a GGUF file, under Hugging Face's names.

use std::collections::BTreeMap;
use std::path::Path;

use super::{GgufFile, hugging_face_name};
use crate::{DecoderConfig, ModelError};

/// What a tensor's name ends in, behind the name of the weight that it changes.
const HALVES: [&str; 2] = [".lora_a", ".lora_b"];

/// An adapter's file, spelled out: what it adds to a weight is `alpha / rank * B A`, or `B A` where alpha is 0.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufAdapter {
    /// `adapter.lora.alpha`.
    pub alpha: f64,
    /// The factors of every module.
    pub pairs: BTreeMap<String, GgufPair>,
}

/// The two factors of one update, rows in Hugging Face's order.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufPair {
    /// Their common dimension, from 1.
    pub rank: usize,
    /// `[rank, in]`
    pub a: Vec<f32>,
    /// `[out, rank]`
    pub b: Vec<f32>,
}

impl GgufAdapter {
    /// The names of a module's two tensors in the file, A's first; `None` where llama.cpp knows no such module.
    pub fn names(config: &DecoderConfig, module: &str) -> Option<[String; 2]> {
        let weight = config.gguf_name(&format!("{module}.weight"))?;
        Some(HALVES.map(|half| format!("{weight}{half}")))
    }

    /// Reads `path`, an adapter for a base of this configuration.
    pub fn open(path: &Path, config: &DecoderConfig) -> Result<Self, ModelError> {
        let file = GgufFile::container(path)?;
        let malformed = |problem: String| ModelError::malformed(path, problem);
        let expected = [
            ("general.type", "adapter"),
            ("adapter.type", "lora"),
            ("general.architecture", config.traits().gguf),
        ];
        for (key, expected) in expected {
            let found = file.text(key);
            if found != Some(expected) {
                return Err(malformed(format!("{key}: expected \"{expected}\", found {found:?}")));
            }
        }
        let alpha = file
            .number("adapter.lora.alpha")
            .ok_or_else(|| malformed("adapter.lora.alpha: expected a number, found none".into()))?;
        let mut halves = HALVES.map(|_| BTreeMap::new());
        for name in file.content.tensor_infos.keys() {
            let half = HALVES.iter().zip(&mut halves).find_map(|(half, found)| {
                Some((hugging_face_name(name.strip_suffix(half)?, config.traits()), found))
            });
            let Some((weight, found)) = half else {
                return Err(malformed(format!("{name}: expected half of a LoRA pair")));
            };
            let module = weight.strip_suffix(".weight").unwrap_or(&weight).to_owned();
            found.insert(module, file.dequantize(name)?);
        }
        let [a, mut b] = halves;
        let mut pairs = BTreeMap::new();
        for (module, (a, a_shape)) in a {
            let (b, b_shape) = b.remove(&module).unwrap_or_default();
            let (&[rank, _], &[rows, b_rank]) = (&a_shape[..], &b_shape[..]) else {
                return Err(malformed(format!(
                    "{module}: expected two matrices, found {a_shape:?}, {b_shape:?}"
                )));
            };
            if rank == 0 || rank != b_rank {
                return Err(malformed(format!("{module}: expected one rank, found {rank} and {b_rank}")));
            }
            let b = config.rows_from_gguf(&module, rows, b);
            pairs.insert(module, GgufPair { rank, a, b });
        }
        match b.into_keys().next() {
            None => Ok(Self { alpha, pairs }),
            Some(module) => Err(malformed(format!("{module}: expected both factors, found B alone"))),
        }
    }
}
