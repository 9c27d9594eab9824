use pronk_kernels::RopeScaling;
use serde_json::{Value, json};

use super::keys::activation_name;
use super::{DecoderConfig, SlidingWindow, Windowed};
use crate::family::WindowKeys;

impl DecoderConfig {
    /// The configuration for a new Hugging Face directory, with the keys that old and new
    /// readers look for.
    pub fn to_json(&self, dtype: &str) -> Value {
        let traits = self.traits();
        let activation = activation_name(traits.activation);
        let mut json = json!({
            "architectures": [traits.class],
            "model_type": traits.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "hidden_act": activation,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "dtype": dtype,
            "torch_dtype": dtype,
        });
        if traits.scaled_embeddings {
            json["hidden_activation"] = activation.into();
        }
        // transformers refuses a cap without a fraction, and a scalar with one.
        let numbers = [
            ("query_pre_attn_scalar", self.query_pre_attn_scalar.map(plain)),
            ("attn_logit_softcapping", self.attn_logit_softcapping.map(Value::from)),
            ("final_logit_softcapping", self.final_logit_softcapping.map(Value::from)),
        ];
        for (key, value) in numbers {
            if traits.keys.contains(&key) {
                json[key] = value.into();
            }
        }
        if traits.packed {
            // Phi-3's readers want it, whether or not positions are scaled.
            json["original_max_position_embeddings"] = self.max_position_embeddings.into();
        }
        self.add_rope(&mut json);
        self.add_window(&mut json);
        json
    }

    fn add_rope(&self, json: &mut Value) {
        let rope_type = |kind: &str| json!({"rope_type": kind});
        let mut scaling = match self.rope_scaling {
            RopeScaling::None => rope_type("default"),
            RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_context as u64,
            }),
        };
        let unscaled = self.rope_scaling == RopeScaling::None;
        json["rope_scaling"] = if unscaled { Value::Null } else { scaling.clone() };
        scaling["rope_theta"] = json!(self.rope_theta);
        json["rope_parameters"] = match self.rope_local_base_freq {
            None => scaling,
            Some(local) => {
                json["rope_local_base_freq"] = json!(local);
                json!({
                    "full_attention": scaling,
                    "sliding_attention": {"rope_type": "default", "rope_theta": local},
                })
            }
        };
    }

    fn add_window(&self, json: &mut Value) {
        let keys = self.traits().window;
        if keys == WindowKeys::None {
            return;
        }
        json["sliding_window"] = self.sliding_window.map_or(Value::Null, |window| window.size.into());
        if keys == WindowKeys::All {
            return;
        }
        let kind = |layer| if self.window(layer).is_some() { "sliding_attention" } else { "full_attention" };
        json["layer_types"] = (0..self.num_hidden_layers).map(kind).collect();
        // What readers look for that know no `layer_types`.
        let layers = self.num_hidden_layers;
        match (keys, self.sliding_window) {
            (WindowKeys::From, window) => {
                json["use_sliding_window"] = window.is_some().into();
                json["max_window_layers"] = match window {
                    Some(SlidingWindow { blocks: Windowed::From(first), .. }) => first,
                    _ => layers,
                }
                .into();
            }
            (_, Some(SlidingWindow { blocks: Windowed::ButEvery(period), .. })) => {
                json["sliding_window_pattern"] = period.into();
            }
            (_, Some(_)) => json["sliding_window_pattern"] = (layers + 1).into(),
            (_, None) => {}
        }
    }
}

/// Whole numbers without a fraction.
fn plain(number: f64) -> Value {
    if number.fract() == 0.0 { json!(number as i64) } else { json!(number) }
}
