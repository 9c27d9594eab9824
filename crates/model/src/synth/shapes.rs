//! What published bases look like.

use pronk_kernels::RopeScaling;

use crate::{DecoderConfig, ModelError};

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
];

const LLAMA_2_7B: DecoderConfig = DecoderConfig {
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
    const PARAMETERS: [(&str, usize); 7] = [
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("tinyllama-1.1b", 1_100_048_384),
        ("smollm2-135m", 134_515_008),
    ];

    #[test]
    fn every_shape_has_the_size_of_its_original() {
        assert_eq!(SHAPES.len(), PARAMETERS.len());
        for (name, expected) in PARAMETERS {
            let config = &Shape::named(name).unwrap().config;
            let found: usize =
                config.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
            assert_eq!(found, expected, "{name}");
            assert_eq!(config.head_dim * config.num_attention_heads, config.hidden_size, "{name}");
            assert_eq!(config.inconsistencies(), Vec::<String>::new(), "{name}");
        }
    }

    #[test]
    fn an_unknown_name_is_told_what_there_is() {
        let error = |name| Shape::named(name).unwrap_err().to_string();
        let told = error("Llama2-7b");
        assert!(told.contains("'Llama2-7b'; did you mean llama-2-7b?\n  there are: llama-2-7b,"), "{told}");
        assert!(told.ends_with("smollm2-135m"), "{told}");
        assert!(!error("gpt-5").contains("did you mean"), "{}", error("gpt-5"));
    }
}
