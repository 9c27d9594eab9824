//! What published bases look like.

use pronk_kernels::RopeScaling;

use crate::{DecoderConfig, Family, ModelError, SlidingWindow, Windowed};

/// A published base, as its `config.json` describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    /// What it is asked for by.
    pub name: &'static str,
    /// What it looks like.
    pub config: DecoderConfig,
}

impl Shape {
    /// The shape called `name`; an unknown name is an error that lists the names there are.
    pub fn named(name: &str) -> Result<&'static Self, ModelError> {
        SHAPES.iter().find(|shape| shape.name == name).ok_or_else(|| unknown(name))
    }
}

/// The bases of which there are synthetic ones. The comments name the repositories on the
/// Hugging Face hub whose `config.json` the numbers are from.
pub const SHAPES: &[Shape] = &[
    // meta-llama/Llama-2-7b-hf
    Shape { name: "llama-2-7b", config: LLAMA_2_7B },
    // meta-llama/Llama-2-13b-hf
    Shape {
        name: "llama-2-13b",
        config: DecoderConfig {
            hidden_size: 5120,
            intermediate_size: 13824,
            num_hidden_layers: 40,
            num_attention_heads: 40,
            num_key_value_heads: 40,
            ..LLAMA_2_7B
        },
    },
    // meta-llama/Meta-Llama-3-8B
    Shape { name: "llama-3-8b", config: LLAMA_3_8B },
    // meta-llama/Llama-3.2-1B
    Shape {
        name: "llama-3.2-1b",
        config: DecoderConfig {
            hidden_size: 2048,
            intermediate_size: 8192,
            num_hidden_layers: 16,
            head_dim: 64,
            ..LLAMA_3_2
        },
    },
    // meta-llama/Llama-3.2-3B
    Shape {
        name: "llama-3.2-3b",
        config: DecoderConfig {
            hidden_size: 3072,
            intermediate_size: 8192,
            num_hidden_layers: 28,
            num_attention_heads: 24,
            ..LLAMA_3_2
        },
    },
    // TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T
    Shape {
        name: "tinyllama-1.1b",
        config: DecoderConfig {
            hidden_size: 2048,
            intermediate_size: 5632,
            num_hidden_layers: 22,
            num_key_value_heads: 4,
            head_dim: 64,
            max_position_embeddings: 2048,
            ..LLAMA_2_7B
        },
    },
    // HuggingFaceTB/SmolLM2-135M
    Shape {
        name: "smollm2-135m",
        config: DecoderConfig {
            vocab_size: 49152,
            hidden_size: 576,
            intermediate_size: 1536,
            num_hidden_layers: 30,
            num_attention_heads: 9,
            num_key_value_heads: 3,
            head_dim: 64,
            max_position_embeddings: 8192,
            rope_theta: 100_000.0,
            tie_word_embeddings: true,
            ..LLAMA_2_7B
        },
    },
    // mistralai/Mistral-7B-v0.1
    Shape {
        name: "mistral-7b",
        config: DecoderConfig {
            family: Family::Mistral,
            intermediate_size: 14336,
            num_key_value_heads: 8,
            max_position_embeddings: 32768,
            sliding_window: Some(SlidingWindow { size: 4096, blocks: Windowed::From(0) }),
            ..LLAMA_2_7B
        },
    },
    // Qwen/Qwen2.5-7B
    Shape {
        name: "qwen2.5-7b",
        config: DecoderConfig {
            family: Family::Qwen2,
            vocab_size: 152_064,
            hidden_size: 3584,
            intermediate_size: 18944,
            num_hidden_layers: 28,
            num_attention_heads: 28,
            num_key_value_heads: 4,
            max_position_embeddings: 131_072,
            rms_norm_eps: 1e-6,
            rope_theta: 1_000_000.0,
            ..LLAMA_2_7B
        },
    },
    // Qwen/Qwen3-8B
    Shape {
        name: "qwen3-8b",
        config: DecoderConfig {
            family: Family::Qwen3,
            vocab_size: 151_936,
            intermediate_size: 12288,
            num_hidden_layers: 36,
            num_key_value_heads: 8,
            max_position_embeddings: 40960,
            rms_norm_eps: 1e-6,
            rope_theta: 1_000_000.0,
            ..LLAMA_2_7B
        },
    },
    // google/gemma-2-9b
    Shape { name: "gemma-2-9b", config: GEMMA_2_9B },
    // google/gemma-3-4b-pt, without what sees pictures
    Shape {
        name: "gemma-3-4b",
        config: DecoderConfig {
            family: Family::Gemma3,
            vocab_size: 262_208,
            hidden_size: 2560,
            intermediate_size: 10240,
            num_hidden_layers: 34,
            num_attention_heads: 8,
            num_key_value_heads: 4,
            max_position_embeddings: 131_072,
            rope_theta: 1_000_000.0,
            rope_scaling: RopeScaling::Linear { factor: 8.0 },
            rope_local_base_freq: Some(10_000.0),
            sliding_window: Some(SlidingWindow { size: 1024, blocks: Windowed::ButEvery(6) }),
            attn_logit_softcapping: None,
            final_logit_softcapping: None,
            ..GEMMA_2_9B
        },
    },
    // microsoft/Phi-3-mini-4k-instruct
    Shape {
        name: "phi-3-mini",
        config: DecoderConfig {
            family: Family::Phi3,
            vocab_size: 32064,
            hidden_size: 3072,
            intermediate_size: 8192,
            head_dim: 96,
            sliding_window: Some(SlidingWindow { size: 2047, blocks: Windowed::From(0) }),
            ..LLAMA_2_7B
        },
    },
];

const LLAMA_2_7B: DecoderConfig = DecoderConfig {
    family: Family::Llama,
    vocab_size: 32000,
    hidden_size: 4096,
    intermediate_size: 11008,
    num_hidden_layers: 32,
    num_attention_heads: 32,
    num_key_value_heads: 32,
    head_dim: 128,
    max_position_embeddings: 4096,
    rms_norm_eps: 1e-5,
    rope_theta: 10_000.0,
    rope_scaling: RopeScaling::None,
    rope_local_base_freq: None,
    sliding_window: None,
    query_pre_attn_scalar: None,
    attn_logit_softcapping: None,
    final_logit_softcapping: None,
    tie_word_embeddings: false,
    attention_bias: false,
    mlp_bias: false,
};

const LLAMA_3_8B: DecoderConfig = DecoderConfig {
    vocab_size: 128_256,
    intermediate_size: 14336,
    num_key_value_heads: 8,
    max_position_embeddings: 8192,
    rope_theta: 500_000.0,
    ..LLAMA_2_7B
};

/// What the small ones of Llama 3.2 have in common.
const LLAMA_3_2: DecoderConfig = DecoderConfig {
    max_position_embeddings: 131_072,
    rope_scaling: RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 8192.0,
    },
    tie_word_embeddings: true,
    ..LLAMA_3_8B
};

const GEMMA_2_9B: DecoderConfig = DecoderConfig {
    family: Family::Gemma2,
    vocab_size: 256_000,
    hidden_size: 3584,
    intermediate_size: 14336,
    num_hidden_layers: 42,
    num_attention_heads: 16,
    num_key_value_heads: 8,
    head_dim: 256,
    max_position_embeddings: 8192,
    rms_norm_eps: 1e-6,
    sliding_window: Some(SlidingWindow { size: 4096, blocks: Windowed::ButEvery(2) }),
    query_pre_attn_scalar: Some(256.0),
    attn_logit_softcapping: Some(50.0),
    final_logit_softcapping: Some(30.0),
    tie_word_embeddings: true,
    ..LLAMA_2_7B
};

fn unknown(name: &str) -> ModelError {
    let likeness = |shape: &Shape| strsim::jaro_winkler(&name.to_lowercase(), shape.name);
    let closest = SHAPES.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    let meant = closest.filter(|shape| likeness(shape) > 0.7);
    let known: Vec<&str> = SHAPES.iter().map(|shape| shape.name).collect();
    ModelError::UnknownShape {
        found: name.to_owned(),
        meant: meant.map(|shape| format!("; did you mean {}?", shape.name)).unwrap_or_default(),
        known: known.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many parameters the originals have.
    const PARAMETERS: [(&str, usize); 13] = [
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("tinyllama-1.1b", 1_100_048_384),
        ("smollm2-135m", 134_515_008),
        ("mistral-7b", 7_241_732_096),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-8b", 8_190_735_360),
        ("gemma-2-9b", 9_241_705_984),
        ("gemma-3-4b", 3_880_263_168),
        ("phi-3-mini", 3_821_079_552),
    ];

    #[test]
    fn every_shape_has_the_size_of_its_original() {
        assert_eq!(SHAPES.len(), PARAMETERS.len());
        for (name, expected) in PARAMETERS {
            let config = &Shape::named(name).unwrap().config;
            let found: usize =
                config.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
            assert_eq!(found, expected, "{name}");
            assert_eq!(config.inconsistencies(), Vec::<String>::new(), "{name}");
            let json = config.to_json("bfloat16").to_string();
            assert_eq!(DecoderConfig::from_json(json.as_bytes()).as_ref(), Ok(config), "{name}");
        }
    }

    #[test]
    fn an_unknown_name_is_told_what_there_is() {
        let error = |name| Shape::named(name).unwrap_err().to_string();
        let told = error("Llama2-7b");
        assert!(told.contains("'Llama2-7b'; did you mean llama-2-7b?\n  there are: llama-2-7b,"), "{told}");
        assert!(told.ends_with("phi-3-mini"), "{told}");
        assert!(!error("gpt-5").contains("did you mean"), "{}", error("gpt-5"));
    }
}
