//! Bases of a published shape with random weights: what such a base costs in memory and time can
//! be measured without downloading it.

mod shapes;
mod tokenizer;

use std::borrow::Cow;
use std::path::Path;

use half::bf16;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;
use safetensors::Dtype;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::bitsandbytes::{QUANTIZATION_CONFIG, quantization_config};
use crate::quantize::{QuantizedStream, QuantizedTensor};
use crate::{CheckpointWriter, DecoderConfig, HostTensor, ModelError, Quantization, Scheme, WrittenWeights};

pub use shapes::{SHAPES, Shape};

/// Standard deviation of the weights: `initializer_range` of Llama's `config.json`.
const STD: f32 = 0.02;

/// Bytes of a file at most, as transformers splits them.
const SHARD_BYTES: usize = 5_000_000_000;

/// Numbers that one generator draws: enough for its start not to be felt, few enough to keep
/// every core busy with the smallest matrix.
const CHUNK: usize = 1 << 16;

/// Writes a base that looks like `config` to the directory `out`, which must not exist or be
/// empty: bfloat16 weights drawn from a normal distribution with standard deviation 0.02, norms
/// of ones, and a tokenizer with a token a byte. It has learned nothing. With a `scheme`, what is
/// written is that base quantized, and the bfloat16 numbers never are.
///
/// A tensor's numbers depend on `seed` and on its name alone, and one tensor at a time is in
/// memory. `progress` hears how many bytes of weights are written and how many there will be.
/// Whatever fails leaves nothing behind.
pub fn synthesize(
    config: &DecoderConfig,
    out: &Path,
    seed: u64,
    scheme: Option<Scheme>,
    mut progress: impl FnMut(u64, u64),
) -> Result<WrittenWeights, ModelError> {
    check(config, out)?;
    let tensor = |(name, shape): (String, Vec<usize>)| match scheme {
        Some(scheme) => {
            let scheme = Quantization::from(scheme).of(&name);
            QuantizedTensor::new(scheme, name, shape, Dtype::BF16)
        }
        None => QuantizedTensor::dense(name, shape, Dtype::BF16),
    };
    let tensors: Vec<QuantizedTensor> = config.tensors().into_iter().map(tensor).collect();
    let mut stream = QuantizedStream::new(out, &tensors);
    let specs = stream.specs();
    let total = specs.iter().map(|spec| spec.bytes() as u64).sum();
    let mut writer = CheckpointWriter::create(out, specs, SHARD_BYTES)?;
    add_text(&mut writer, "config.json", &config_json(config, scheme))?;
    for (name, text) in tokenizer::files(config.max_position_embeddings) {
        add_text(&mut writer, name, &text)?;
    }
    // One memory for all tensors: to ask the system for it again costs as much as to fill it.
    let (mut numbers, mut done) = (Vec::new(), 0);
    for tensor in &tensors {
        progress(done, total);
        values(tensor, seed, config.traits().norms_less_one, &mut numbers);
        let bytes = Cow::Borrowed(bytemuck::cast_slice(&numbers));
        let host = HostTensor { dtype: Dtype::BF16, shape: tensor.shape.clone(), bytes };
        stream.write(tensor, host, &mut |name, bytes| writer.write(name, bytes))?;
        done += tensor.specs().iter().map(|spec| spec.bytes() as u64).sum::<u64>();
    }
    progress(done, total);
    writer.finish()
}

/// Refuses what no decoder could be, and what has no place for the tokenizer's tokens.
fn check(config: &DecoderConfig, out: &Path) -> Result<(), ModelError> {
    let mut problems = config.inconsistencies();
    if config.vocab_size < tokenizer::TOKENS {
        let (least, found) = (tokenizer::TOKENS, config.vocab_size);
        problems
            .push(format!("vocab_size: expected at least {least}, a token a byte and three, found {found}"));
    }
    if problems.is_empty() { Ok(()) } else { Err(ModelError::Unsupported { path: out.into(), problems }) }
}

fn config_json(config: &DecoderConfig, scheme: Option<Scheme>) -> Value {
    let mut json = config.to_json("bfloat16");
    for (key, id) in tokenizer::SPECIAL_IDS {
        json[key] = id.into();
    }
    if let Some(scheme) = scheme {
        json[QUANTIZATION_CONFIG] = quantization_config(&scheme.into());
    }
    json
}

fn add_text(writer: &mut CheckpointWriter, name: &str, json: &Value) -> Result<(), ModelError> {
    writer.add_file(name, format!("{json:#}\n").as_bytes())
}

/// Puts the numbers of one tensor in the place of `numbers`, as bfloat16 in the byte order of a
/// file: ones for a norm, or zeros where it is stored less one, for all others draws from
/// N(0, 0.02^2).
///
/// `ChaCha8` keyed with the seed and the name, a stream of it for every [`CHUNK`], so that no
/// number depends on the order of the tensors or on the threads. The ziggurat method (Doornik
/// 2005, `rand_distr`) makes normal numbers of its bits: exact in the tails, and still faster
/// than a disk.
fn values(tensor: &QuantizedTensor, seed: u64, norms_less_one: bool, numbers: &mut Vec<u16>) {
    let count = tensor.shape.iter().product();
    let one = if norms_less_one { bf16::ZERO } else { bf16::ONE };
    numbers.clear();
    numbers.resize(count, one.to_bits().to_le());
    if tensor.name.ends_with("norm.weight") {
        return;
    }
    let key = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(&tensor.name).finalize();
    numbers.par_chunks_mut(CHUNK).enumerate().for_each(|(stream, chunk)| {
        let mut rng = ChaCha8Rng::from_seed(key.into());
        rng.set_stream(stream as u64);
        for number in chunk {
            let normal: f32 = rng.sample(StandardNormal);
            *number = bf16::from_f32(normal * STD).to_bits().to_le();
        }
    });
}
