//! What a GGUF file's metadata say about the decoder.

use pronk_kernels::RopeScaling;

use super::GgufFile;
use crate::config::MOST_LAYERS;
use crate::family::{Family, WindowKeys, listed};
use crate::{DecoderConfig, ModelError, SlidingWindow, Windowed};

/// Llama 3's factors of the rotary frequencies, kept as a tensor.
pub const ROPE_FREQS: &str = "rope_freqs.weight";
/// Powers of two that Llama 3's first contexts, 8192, are looked for among.
const LLAMA3_CONTEXTS: std::ops::RangeInclusive<u32> = 5..=20;

/// Blocks of Gemma 2's and Gemma 3's 27B, where llama.cpp scales scores by the width of a head as it
/// would be without `head_dim`.
const GEMMA_27B: [(Family, usize); 2] = [(Family::Gemma2, 46), (Family::Gemma3, 62)];
/// Of the blocks of Gemma 3 that see a window; older files do not tell it.
const GEMMA3_LOCAL_THETA: f64 = 10_000.0;

impl GgufFile {
    /// The family that the file is of. llama.cpp calls Mistral's llama.
    pub(super) fn family(&self) -> Result<Family, ModelError> {
        let architecture = self.text("general.architecture").unwrap_or("(none)");
        match Family::of_gguf(architecture) {
            Some(Family::Llama) if self.window_size().is_some() => Ok(Family::Mistral),
            Some(family) => Ok(family),
            None => {
                let expected = listed(|traits| traits.gguf);
                let problem =
                    format!("general.architecture: expected one of {expected}, found \"{architecture}\"");
                Err(ModelError::Unsupported { path: self.path.clone(), problems: vec![problem] })
            }
        }
    }

    /// A number that the file has for its architecture.
    fn hyper(&self, key: &str) -> Option<f64> {
        self.number(&format!("{}.{key}", self.text("general.architecture")?))
    }

    fn window_size(&self) -> Option<usize> {
        self.hyper("attention.sliding_window").filter(|n| (1.0..4e9).contains(n)).map(|n| n as usize)
    }

    pub(super) fn config(&self, family: Family) -> Result<DecoderConfig, ModelError> {
        let unsupported =
            |problems: Vec<String>| ModelError::Unsupported { path: self.path.clone(), problems };
        let arch = family.traits().gguf;
        let mut problems = Vec::new();
        let mut size = |key: &str, default: Option<usize>| {
            let found = self.hyper(key);
            if let Some(n) = found.filter(|n| (1.0..4e9).contains(n)).map(|n| n as usize).or(default) {
                n
            } else {
                problems.push(format!("{arch}.{key}: expected a whole number from 1, found {found:?}"));
                1
            }
        };
        let hidden_size = size("embedding_length", None);
        let num_attention_heads = size("attention.head_count", None);
        // Old files tell a head's width by the features of it that turn.
        let turned = size("rope.dimension_count", Some(hidden_size / num_attention_heads));
        let turned_alone = if family.traits().packed { hidden_size / num_attention_heads } else { turned };
        let head_dim = size("attention.key_length", Some(turned_alone));
        let num_hidden_layers = size("block_count", None);
        let shapes = self.shapes();
        let config = DecoderConfig {
            family,
            vocab_size: shapes.get("model.embed_tokens.weight").and_then(|s| s.first().copied()).unwrap_or(0),
            hidden_size,
            intermediate_size: size("feed_forward_length", None),
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads: size("attention.head_count_kv", Some(num_attention_heads)),
            head_dim,
            max_position_embeddings: size("context_length", Some(2048)),
            rms_norm_eps: shortest(self.hyper("attention.layer_norm_rms_epsilon").unwrap_or(1e-5)),
            rope_theta: shortest(self.hyper("rope.freq_base").unwrap_or(10_000.0)),
            rope_scaling: RopeScaling::None,
            rope_local_base_freq: (family == Family::Gemma3)
                .then(|| shortest(self.hyper("rope.freq_base_swa").unwrap_or(GEMMA3_LOCAL_THETA))),
            sliding_window: self.sliding_window(family, num_hidden_layers),
            query_pre_attn_scalar: None,
            attn_logit_softcapping: self.hyper("attn_logit_softcapping").map(shortest),
            final_logit_softcapping: self.hyper("final_logit_softcapping").map(shortest),
            tie_word_embeddings: !shapes.contains_key("lm_head.weight"),
            attention_bias: shapes.contains_key("model.layers.0.self_attn.o_proj.bias"),
            mlp_bias: shapes.contains_key("model.layers.0.mlp.up_proj.bias"),
        };
        let config = DecoderConfig { query_pre_attn_scalar: query_pre_attn_scalar(&config), ..config };
        problems.extend(config.inconsistencies());
        if self.hyper("expert_count").is_some_and(|n| n > 0.0) {
            problems.push(format!("{arch}.expert_count: mixtures of experts are not supported"));
        }
        if turned != head_dim && self.hyper("rope.dimension_count").is_some() {
            problems.push(format!(
                "{arch}.rope.dimension_count: expected {head_dim}, as wide as a head, found {turned}"
            ));
        }
        match self.rope_scaling(&config) {
            Ok(rope_scaling) if problems.is_empty() => Ok(DecoderConfig { rope_scaling, ..config }),
            Ok(_) => Err(unsupported(problems)),
            Err(problem) => Err(unsupported([problems, vec![problem]].concat())),
        }
    }

    /// The window, in the blocks that the family has it in.
    fn sliding_window(&self, family: Family, layers: usize) -> Option<SlidingWindow> {
        let blocks = match family.traits().window {
            WindowKeys::None | WindowKeys::From => return None,
            WindowKeys::All => Windowed::From(0),
            WindowKeys::ButEvery(period) => self.window_pattern().unwrap_or(Windowed::ButEvery(period)),
        };
        SlidingWindow::new(self.window_size()?, blocks, layers.min(MOST_LAYERS))
    }

    /// The blocks with a window as newer files tell them: one by one, or by a period.
    fn window_pattern(&self) -> Option<Windowed> {
        let key = format!("{}.attention.sliding_window_pattern", self.text("general.architecture")?);
        let period = self.number(&key).filter(|n| *n >= 1.0).map(|n| Windowed::ButEvery(n as usize));
        period.or_else(|| {
            Windowed::of(&self.numbers(&key).into_iter().map(|windowed| windowed > 0.0).collect::<Vec<_>>())
        })
    }

    /// llama.cpp stores Llama 3's scaling as the factors of the frequencies; the numbers behind them are found
    /// again.
    fn rope_scaling(&self, config: &DecoderConfig) -> Result<RopeScaling, String> {
        if self.content.tensor_infos.contains_key(ROPE_FREQS) {
            let (factors, _) = self.dequantize(ROPE_FREQS).map_err(|e| e.to_string())?;
            return llama3_scaling(&factors, config.head_dim, config.rope_theta)
                .ok_or_else(|| format!("{ROPE_FREQS}: these factors are those of no Llama 3"));
        }
        let arch = config.traits().gguf;
        match self.text(&format!("{arch}.rope.scaling.type")).unwrap_or("none") {
            "none" => Ok(RopeScaling::None),
            "linear" => {
                let factor = self.hyper("rope.scaling.factor").unwrap_or(1.0);
                Ok(RopeScaling::Linear { factor: shortest(factor) })
            }
            other => Err(format!("{arch}.rope.scaling.type: \"{other}\" is not supported")),
        }
    }
}

/// What llama.cpp divides scores by the square root of, where that is not the width of a head: no key tells it.
pub fn query_pre_attn_scalar(config: &DecoderConfig) -> Option<f64> {
    if GEMMA_27B.contains(&(config.family, config.num_hidden_layers)) {
        return Some(config.hidden_size as f64 / config.num_attention_heads as f64);
    }
    config.traits().scaled_embeddings.then_some(config.head_dim as f64)
}

/// The scaling that has these factors: by the largest of them, over every context that a base could have been
/// trained with first. Where its slow and its fast turns end is the same in all releases.
fn llama3_scaling(factors: &[f32], head_dim: usize, theta: f64) -> Option<RopeScaling> {
    let factor = f64::from(factors.iter().copied().fold(1.0, f32::max));
    let fits = |scaling: &RopeScaling| {
        let ours = scaling.factors(head_dim, theta);
        ours.len() == factors.len()
            && ours.iter().zip(factors).all(|(a, &b)| (a / f64::from(b) - 1.0).abs() < 1e-3)
    };
    let scaling = |exponent| RopeScaling::Llama3 {
        factor: shortest(factor),
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: f64::from(1_u32 << exponent),
    };
    LLAMA3_CONTEXTS.map(scaling).find(fits)
}

/// GGUF holds constants as float32: the shortest decimal of it is what was meant (1e-5, not
/// 9.99999974e-6).
fn shortest(value: f64) -> f64 {
    (value as f32).to_string().parse().unwrap_or(value)
}
