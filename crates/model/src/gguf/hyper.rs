//! What a decoder's configuration becomes in a GGUF file's metadata.

use candle_core::quantized::gguf_file::Value;
use pronk_kernels::RopeScaling;

use super::config::query_pre_attn_scalar;
use crate::DecoderConfig;
use crate::family::WindowKeys;

impl DecoderConfig {
    /// `general.architecture` of a GGUF file of this decoder, or of an adapter for it.
    pub fn gguf_architecture(&self) -> &'static str {
        self.traits().gguf
    }

    /// The keys of a GGUF file that llama.cpp reads this decoder from, `general.architecture` first. What
    /// a GGUF file has no key for is refused by name, all of it at once.
    ///
    /// Llama 3's scaling is no key but a tensor, see [`DecoderConfig::rope_freqs`].
    pub fn to_gguf(&self) -> Result<Vec<(String, Value)>, Vec<String>> {
        let problems = self.without_gguf_key();
        if !problems.is_empty() {
            return Err(problems);
        }
        let arch = self.traits().gguf;
        let mut keys = vec![("general.architecture".to_owned(), Value::String(arch.into()))];
        let mut add = |key: &str, value: Value| keys.push((format!("{arch}.{key}"), value));
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("context_length", self.max_position_embeddings),
            ("embedding_length", self.hidden_size),
            ("block_count", self.num_hidden_layers),
            ("feed_forward_length", self.intermediate_size),
            ("attention.head_count", self.num_attention_heads),
            ("attention.head_count_kv", self.num_key_value_heads),
            ("attention.key_length", self.head_dim),
            ("attention.value_length", self.head_dim),
            ("rope.dimension_count", self.head_dim),
        ];
        for (key, size) in sizes {
            add(key, Value::U32(size as u32));
        }
        add("attention.layer_norm_rms_epsilon", Value::F32(self.rms_norm_eps as f32));
        add("rope.freq_base", Value::F32(self.rope_theta as f32));
        if let RopeScaling::Linear { factor } = self.rope_scaling {
            add("rope.scaling.type", Value::String("linear".into()));
            add("rope.scaling.factor", Value::F32(factor as f32));
        }
        let numbers = [
            ("rope.freq_base_swa", self.rope_local_base_freq),
            ("attn_logit_softcapping", self.attn_logit_softcapping),
            ("final_logit_softcapping", self.final_logit_softcapping),
        ];
        for (key, number) in numbers {
            if let Some(number) = number {
                add(key, Value::F32(number as f32));
            }
        }
        if let Some(window) = self.sliding_window {
            add("attention.sliding_window", Value::U32(window.size as u32));
            if matches!(self.traits().window, WindowKeys::ButEvery(_)) {
                let windowed =
                    (0..self.num_hidden_layers).map(|layer| Value::Bool(window.blocks.contains(layer)));
                add("attention.sliding_window_pattern", Value::Array(windowed.collect()));
            }
        }
        Ok(keys)
    }

    /// What each rotary frequency is divided by, where llama.cpp wants that as the tensor
    /// `rope_freqs.weight`.
    pub fn rope_freqs(&self) -> Option<Vec<f32>> {
        let llama3 = matches!(self.rope_scaling, RopeScaling::Llama3 { .. });
        let factors = || self.rope_scaling.factors(self.head_dim, self.rope_theta);
        llama3.then(|| factors().into_iter().map(|factor| factor as f32).collect())
    }

    fn without_gguf_key(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if let (WindowKeys::From, Some(window)) = (self.traits().window, self.sliding_window) {
            problems.push(format!("sliding_window {}: llama.cpp has no window for this family", window.size));
        }
        let (found, expected) = (self.query_pre_attn_scalar, query_pre_attn_scalar(self));
        if found != expected {
            problems
                .push(format!("query_pre_attn_scalar: llama.cpp takes {expected:?} here, found {found:?}"));
        }
        problems
    }
}
