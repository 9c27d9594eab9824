//! What a GGUF file's metadata say about the decoder.

use pronk_kernels::RopeScaling;

use super::GgufFile;
use crate::{DecoderConfig, ModelError};

/// Llama 3's factors of the rotary frequencies, kept as a tensor.
pub const ROPE_FREQS: &str = "rope_freqs.weight";
/// Scaling factors of Llama 3.1 and 3.2.
const LLAMA3_RELEASES: [f64; 2] = [8.0, 32.0];

impl GgufFile {
    pub(super) fn config(&self) -> Result<DecoderConfig, ModelError> {
        let architecture = self.text("general.architecture").unwrap_or("(none)");
        let unsupported =
            |problems: Vec<String>| ModelError::Unsupported { path: self.path.clone(), problems };
        if architecture != "llama" {
            return Err(unsupported(vec![format!(
                "general.architecture: expected \"llama\", found \"{architecture}\""
            )]));
        }
        let mut problems = Vec::new();
        let mut size = |key: &str, default: Option<usize>| {
            let found = self.number(&format!("llama.{key}"));
            if let Some(n) = found.filter(|n| (1.0..4e9).contains(n)).map(|n| n as usize).or(default) {
                n
            } else {
                problems.push(format!("llama.{key}: expected a whole number from 1, found {found:?}"));
                1
            }
        };
        let hidden_size = size("embedding_length", None);
        let num_attention_heads = size("attention.head_count", None);
        let head_dim = size("rope.dimension_count", Some(hidden_size / num_attention_heads));
        let head_dim = size("attention.key_length", Some(head_dim));
        let shapes = self.shapes();
        let config = DecoderConfig {
            vocab_size: shapes.get("model.embed_tokens.weight").and_then(|s| s.first().copied()).unwrap_or(0),
            hidden_size,
            intermediate_size: size("feed_forward_length", None),
            num_hidden_layers: size("block_count", None),
            num_attention_heads,
            num_key_value_heads: size("attention.head_count_kv", Some(num_attention_heads)),
            head_dim,
            max_position_embeddings: size("context_length", Some(2048)),
            rms_norm_eps: shortest(self.number("llama.attention.layer_norm_rms_epsilon").unwrap_or(1e-5)),
            rope_theta: shortest(self.number("llama.rope.freq_base").unwrap_or(10_000.0)),
            rope_scaling: RopeScaling::None,
            tie_word_embeddings: !shapes.contains_key("lm_head.weight"),
            attention_bias: shapes.contains_key("model.layers.0.self_attn.o_proj.bias"),
            mlp_bias: shapes.contains_key("model.layers.0.mlp.up_proj.bias"),
        };
        problems.extend(config.inconsistencies());
        if self.number("llama.expert_count").is_some_and(|n| n > 0.0) {
            problems.push("llama.expert_count: mixtures of experts are not supported".into());
        }
        match self.rope_scaling(&config) {
            Ok(rope_scaling) if problems.is_empty() => Ok(DecoderConfig { rope_scaling, ..config }),
            Ok(_) => Err(unsupported(problems)),
            Err(problem) => Err(unsupported([problems, vec![problem]].concat())),
        }
    }

    /// llama.cpp stores Llama 3's scaling as the factors of the frequencies. The four numbers
    /// behind them are those of a release: the release whose factors these are is looked up.
    fn rope_scaling(&self, config: &DecoderConfig) -> Result<RopeScaling, String> {
        if self.content.tensor_infos.contains_key(ROPE_FREQS) {
            let (factors, _) = self.dequantize(ROPE_FREQS).map_err(|e| e.to_string())?;
            let fits = |scaling: &RopeScaling| {
                let ours = scaling.factors(config.head_dim, config.rope_theta);
                ours.len() == factors.len()
                    && ours.iter().zip(&factors).all(|(a, &b)| (a / f64::from(b) - 1.0).abs() < 1e-3)
            };
            return LLAMA3_RELEASES
                .map(|factor| RopeScaling::Llama3 {
                    factor,
                    low_freq_factor: 1.0,
                    high_freq_factor: 4.0,
                    original_context: 8192.0,
                })
                .into_iter()
                .find(fits)
                .ok_or_else(|| format!("{ROPE_FREQS}: these factors are those of no known Llama 3 release"));
        }
        match self.text("llama.rope.scaling.type").unwrap_or("none") {
            "none" => Ok(RopeScaling::None),
            "linear" => {
                let factor = self.number("llama.rope.scaling.factor").unwrap_or(1.0);
                Ok(RopeScaling::Linear { factor: shortest(factor) })
            }
            other => Err(format!("llama.rope.scaling.type: \"{other}\" is not supported")),
        }
    }
}

/// GGUF holds constants as float32: the shortest decimal of it is what was meant (1e-5, not
/// 9.99999974e-6).
fn shortest(value: f64) -> f64 {
    (value as f32).to_string().parse().unwrap_or(value)
}
