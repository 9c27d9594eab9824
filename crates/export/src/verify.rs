use std::path::Path;

use burn::tensor::Device;
use pronk_kernels::open_device;
use pronk_lora::{Adapter, ForwardMode};
use pronk_model::{Base, Decoder, DecoderConfig, LoadConfig, Residency};

use crate::update::values;
use crate::{Dtype, ExportError, GgufType};

/// How closely a merged model answers as its base and adapter do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Verification {
    /// The largest difference between two logits.
    pub max_abs_difference: f32,
    /// The largest logit, to compare the difference with.
    pub max_logit: f32,
    /// Kullback-Leibler divergence of the merged model's next-token distribution from that of
    /// base and adapter, in nats, the mean over the prompt's positions.
    pub kl: f64,
}

/// Compares the model in the directory `merged`, which is to be as `expected`, with `base` and `adapter` on `prompt`. Blocks
/// are read and run one at a time, first of the one, then of the other: the largest models are
/// verified in little memory.
///
/// A divergence above what rounding explains is an error, and so is a logit that is not finite.
/// The bounds, in nats, are over ten times the most that was seen, which was SmolLM2 rounded as
/// a whole, on tokens that make no sense (on a sentence, a thirtieth of that):
/// - bfloat16 5e-2: the weights are rounded to 8 bits; 4e-3 seen
/// - float16 1e-3: to 11 bits; 5e-5 seen
/// - float32 1e-6 on a CPU; 3e-11 seen. Elsewhere 1e-4: products may be taken with 11 bits (TF32)
pub fn verify(
    base: &Base,
    adapter: &Adapter,
    expected: &DecoderConfig,
    merged: &Path,
    prompt: &[u32],
    device: &Device,
) -> Result<Verification, ExportError> {
    let merged = Base::open(merged)?;
    same_decoder(&merged, expected)?;
    let dtype = coarsest(&merged)?;
    let result = measure(base, adapter, &merged, prompt, device)?;
    within("the merged model", result, bound(dtype, device), dtype.torch_name(), dtype == Dtype::F32)
}

/// The same for a merged GGUF file whose matrices are kept in `kind`. Bounds of the quantizations, in nats, again over
/// ten times what was seen on SmolLM2:
/// - `Q8_0` 5e-2
/// - `Q4_0`, `Q4_K` 2: what four bits cost depends on the model; rows in the wrong order cost more
pub fn verify_gguf(
    base: &Base,
    adapter: &Adapter,
    expected: &DecoderConfig,
    merged: &Path,
    kind: GgufType,
    prompt: &[u32],
    device: &Device,
) -> Result<Verification, ExportError> {
    let merged = Base::open(merged)?;
    let family = merged.config.family; // llama.cpp has one name for Llama and Mistral
    same_decoder(&merged, &DecoderConfig { family, ..expected.clone() })?;
    let bound = match kind {
        GgufType::F32 => bound(Dtype::F32, device),
        GgufType::F16 => bound(Dtype::F16, device),
        GgufType::Bf16 | GgufType::Q8_0 => bound(Dtype::Bf16, device),
        GgufType::Q4_0 | GgufType::Q4K => 2.0,
    };
    let result = measure(base, adapter, &merged, prompt, device)?;
    within("the merged model", result, bound, &kind.to_string(), kind == GgufType::F32)
}

fn same_decoder(merged: &Base, expected: &DecoderConfig) -> Result<(), ExportError> {
    if merged.config == *expected {
        return Ok(());
    }
    Err(ExportError::Unfaithful {
        what: "the merged model",
        problem: format!("expected the configuration {expected:?}, found {:?}", merged.config),
    })
}

/// How the model `merged` answers beside `base` and `adapter`, whatever the difference: for a merge into another
/// base than the adapter was trained on.
pub fn measure(
    base: &Base,
    adapter: &Adapter,
    merged: &Base,
    prompt: &[u32],
    device: &Device,
) -> Result<Verification, ExportError> {
    let vocab_size = base.config.tuned_by(adapter).vocab_size;
    let expected = logits("base and adapter", base, Some(adapter), prompt, device)?;
    let found = logits("the merged model", merged, None, prompt, device)?;
    if expected.len() != found.len() {
        let (expected, found) = (vocab_size, merged.config.vocab_size);
        let problem = format!("expected a vocabulary of {expected} tokens, found {found}");
        return Err(ExportError::Unfaithful { what: "the merged model", problem });
    }
    Ok(compare(&expected, &found, vocab_size))
}

/// Compares the adapter `found`, as another runtime reads it, with `adapter` on `base` and `prompt`, in the same way.
pub fn verify_adapter(
    base: &Base,
    adapter: &Adapter,
    found: &Adapter,
    prompt: &[u32],
    device: &Device,
) -> Result<Verification, ExportError> {
    let vocab_size = base.config.tuned_by(adapter).vocab_size;
    let expected = logits("base and adapter", base, Some(adapter), prompt, device)?;
    let found = logits("base and exported adapter", base, Some(found), prompt, device)?;
    let result = compare(&expected, &found, vocab_size);
    within("the exported adapter", result, bound(Dtype::F32, device), Dtype::F32.torch_name(), true)
}

/// `result`, unless `what`, kept in `format`, diverges by more than `bound`, which is what rounding explains.
fn within(
    what: &'static str,
    result: Verification,
    bound: f64,
    format: &str,
    is_exact: bool,
) -> Result<Verification, ExportError> {
    if result.kl <= bound {
        return Ok(result);
    }
    let remedy = if is_exact {
        "this is a fault of pronk's, please report it"
    } else {
        "try float32 (f32): if that fails too, it is a fault of pronk's, please report it"
    };
    Err(ExportError::Unfaithful {
        what,
        problem: format!(
            "expected a KL divergence of at most {bound:.0e} nats ({format}), found {:.3e}, and logits that differ by \
             up to {:.3e} of {:.3e}; {remedy}",
            result.kl, result.max_abs_difference, result.max_logit
        ),
    })
}

/// Refuses tokens that a model of this configuration computes no logits for.
pub fn check_prompt(config: &DecoderConfig, prompt: &[u32]) -> Result<(), ExportError> {
    let vocab_size = config.vocab_size;
    let problem = match prompt.iter().find(|&&id| id as usize >= vocab_size) {
        Some(id) => format!("expected ids below the vocabulary's size, {vocab_size}, found {id}"),
        None if prompt.is_empty() => "expected at least one token, found none".to_owned(),
        None => return Ok(()),
    };
    Err(ExportError::Prompt { problem })
}

fn logits(
    whose: &'static str,
    base: &Base,
    adapter: Option<&Adapter>,
    prompt: &[u32],
    device: &Device,
) -> Result<Vec<f32>, ExportError> {
    // A block at a time: a machine that can merge a base can verify it too.
    let config = LoadConfig { weights: Residency::Streamed, ..LoadConfig::default() };
    let decoder = Decoder::load(base, device, config, |_, _| {})?;
    let logits = values(&decoder.logits(prompt, ForwardMode::inference(adapter)))?;
    match logits.iter().find(|x| !x.is_finite()) {
        Some(x) => {
            let problem = format!("expected finite logits, found {x} among those of {whose}");
            Err(ExportError::Unfaithful { what: whose, problem })
        }
        None => Ok(logits),
    }
}

/// Both are `[tokens, vocab_size]`.
fn compare(expected: &[f32], found: &[f32], vocab_size: usize) -> Verification {
    let pairs = expected.iter().zip(found);
    let max_abs_difference = pairs.map(|(e, f)| (e - f).abs()).fold(0.0, f32::max);
    let max_logit = expected.iter().map(|x| x.abs()).fold(0.0, f32::max);
    let rows = || expected.chunks(vocab_size.max(1)).zip(found.chunks(vocab_size.max(1)));
    let kl: f64 = rows().map(|(e, f)| divergence(e, f)).sum();
    Verification { max_abs_difference, max_logit, kl: (kl / rows().count().max(1) as f64).max(0.0) }
}

/// `sum p (ln p - ln q)` of the distributions that two rows of logits stand for.
fn divergence(expected: &[f32], found: &[f32]) -> f64 {
    let log_sum_exp = |row: &[f32]| {
        let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        max + row.iter().map(|&x| (f64::from(x) - max).exp()).sum::<f64>().ln()
    };
    let (norm_p, norm_q) = (log_sum_exp(expected), log_sum_exp(found));
    let terms = expected.iter().zip(found).map(|(&e, &f)| {
        let (ln_p, ln_q) = (f64::from(e) - norm_p, f64::from(f) - norm_q);
        ln_p.exp() * (ln_p - ln_q)
    });
    terms.sum()
}

/// The format with the fewest bits among a model's tensors.
fn coarsest(model: &Base) -> Result<Dtype, ExportError> {
    let mut found = Vec::new();
    for name in model.shapes().keys() {
        found.push(Dtype::of_file(model.read(name)?.dtype));
    }
    Ok(Dtype::ALL.into_iter().rev().find(|d| found.contains(d)).unwrap_or(Dtype::F32))
}

fn bound(dtype: Dtype, device: &Device) -> f64 {
    let cpu = || ["cpu", "tch:cpu"].iter().any(|name| open_device(name).is_ok_and(|d| d == *device));
    match dtype {
        Dtype::Bf16 => 5e-2,
        Dtype::F16 => 1e-3,
        Dtype::F32 if cpu() => 1e-6,
        Dtype::F32 => 1e-4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_of_two_known_distributions() {
        // p = (1/2, 1/2), q = (1/4, 3/4), each shifted by a constant that must not matter
        let (p, q) = ([7.0, 7.0], [1.0, 1.0 + 3_f32.ln()]);
        let expected = 0.5 * (0.5_f64 / 0.25).ln() + 0.5 * (0.5_f64 / 0.75).ln();
        assert!((divergence(&p, &q) - expected).abs() < 1e-7);
        let result = compare(&[p, p].concat(), &[p, q].concat(), 2);
        assert!((result.kl - expected / 2.0).abs() < 1e-7, "the mean over two positions");
        assert_eq!((result.max_abs_difference, result.max_logit), (6.0, 7.0));
        assert!(compare(&p, &p, 2).kl.abs() < 1e-12);
    }
}
