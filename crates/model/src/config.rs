//! The decoder's description, from `config.json` or from a GGUF file's metadata.

use pronk_kernels::RopeScaling;
use pronk_lora::ModuleShape;
use serde_json::{Map, Value, json};

use crate::bitsandbytes::stored_scheme;

/// A Llama-family decoder. Field names are those of Hugging Face's `config.json`.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // the names say it
pub struct DecoderConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    pub tie_word_embeddings: bool,
    pub attention_bias: bool,
    pub mlp_bias: bool,
}

/// Keys that would change the result, beside the value that leaves it alone.
const REFUSED_UNLESS: [(&str, Option<f64>); 21] = [
    ("sliding_window", None),
    ("final_logit_softcapping", None),
    ("attn_logit_softcapping", None),
    ("query_pre_attn_scalar", None),
    ("clip_qkv", None),
    ("num_experts", None),
    ("num_local_experts", None),
    ("no_rope_layers", None),
    ("attention_sinks", None),
    ("use_qk_norm", None),
    ("qk_layernorm", None),
    ("use_sliding_window", None),
    ("attention_chunk_size", None),
    ("alibi", None),
    ("partial_rotary_factor", Some(1.0)),
    ("logit_scale", Some(1.0)),
    ("logits_scaling", Some(1.0)),
    ("embedding_multiplier", Some(1.0)),
    ("residual_multiplier", Some(1.0)),
    ("attention_multiplier", None),
    ("attention_out_bias", None),
];

/// Far more than any decoder has. The names of four billion layers would fill the memory before
/// the first of them is found missing.
const MOST_LAYERS: usize = 1024;

impl DecoderConfig {
    /// Reads `config.json`. Whatever would change the result and is not computed here is
    /// refused by name, all of it at once.
    pub fn from_json(text: &[u8]) -> Result<Self, Vec<String>> {
        let value: Value =
            serde_json::from_slice(text).map_err(|e| vec![format!("not a JSON document ({e})")])?;
        let Value::Object(map) = &value else { return Err(vec!["expected a JSON object".into()]) };
        let mut keys = Keys { map, problems: Vec::new() };
        keys.refuse();
        let rope = keys.rope();
        let hidden_size = keys.size("hidden_size");
        let num_attention_heads = keys.size("num_attention_heads");
        let head_dim = keys.size_or("head_dim", hidden_size / num_attention_heads.max(1));
        let config = Self {
            vocab_size: keys.size("vocab_size"),
            hidden_size,
            intermediate_size: keys.size("intermediate_size"),
            num_hidden_layers: keys.size("num_hidden_layers"),
            num_attention_heads,
            num_key_value_heads: keys.size_or("num_key_value_heads", num_attention_heads),
            head_dim,
            max_position_embeddings: keys.size_or("max_position_embeddings", 2048),
            rms_norm_eps: keys.number_or("rms_norm_eps", 1e-6),
            rope_theta: rope.0,
            rope_scaling: rope.1,
            tie_word_embeddings: keys.flag("tie_word_embeddings"),
            attention_bias: keys.flag("attention_bias"),
            mlp_bias: keys.flag("mlp_bias"),
        };
        let mut problems = keys.problems;
        problems.extend(config.inconsistencies());
        if problems.is_empty() { Ok(config) } else { Err(problems) }
    }

    /// What no decoder could be built from, whatever the file said.
    pub(crate) fn inconsistencies(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let (q, kv) = (self.num_attention_heads, self.num_key_value_heads);
        if kv == 0 || !q.is_multiple_of(kv) {
            problems.push(format!("num_attention_heads {q} is not a multiple of num_key_value_heads {kv}"));
        }
        if !self.head_dim.is_multiple_of(2) {
            problems.push(format!("head_dim: expected an even number, found {}", self.head_dim));
        }
        if self.num_hidden_layers > MOST_LAYERS {
            let found = self.num_hidden_layers;
            problems.push(format!("num_hidden_layers: expected at most {MOST_LAYERS}, found {found}"));
        }
        problems
    }

    /// The configuration for a new Hugging Face directory, with the keys that old and new
    /// readers look for.
    pub fn to_json(&self, dtype: &str) -> Value {
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
        let old_scaling = if self.rope_scaling == RopeScaling::None { Value::Null } else { scaling.clone() };
        scaling["rope_theta"] = json!(self.rope_theta);
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": old_scaling,
            "rope_parameters": scaling,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "dtype": dtype,
            "torch_dtype": dtype,
        })
    }

    /// The linear layers of the blocks, in the order in which they run.
    pub fn linear_modules(&self) -> Vec<ModuleShape> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let q = self.num_attention_heads * self.head_dim;
        let kv = self.num_key_value_heads * self.head_dim;
        let linears = [
            ("self_attn.q_proj", hidden, q),
            ("self_attn.k_proj", hidden, kv),
            ("self_attn.v_proj", hidden, kv),
            ("self_attn.o_proj", q, hidden),
            ("mlp.gate_proj", hidden, inner),
            ("mlp.up_proj", hidden, inner),
            ("mlp.down_proj", inner, hidden),
        ];
        let block = |layer: usize| {
            linears.map(|(name, in_features, out_features)| ModuleShape {
                name: format!("{}{name}", block_prefix(layer)),
                in_features,
                out_features,
            })
        };
        (0..self.num_hidden_layers).flat_map(block).collect()
    }

    /// Every tensor that the checkpoint must hold, with its shape.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let vector = |name: String| (name, vec![self.hidden_size]);
        let mut all = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, self.hidden_size])];
        for module in self.linear_modules() {
            let bias = if module.name.contains("mlp") { self.mlp_bias } else { self.attention_bias };
            if bias {
                all.push((format!("{}.bias", module.name), vec![module.out_features]));
            }
            all.push((format!("{}.weight", module.name), vec![module.out_features, module.in_features]));
        }
        for prefix in (0..self.num_hidden_layers).map(block_prefix) {
            all.push(vector(format!("{prefix}input_layernorm.weight")));
            all.push(vector(format!("{prefix}post_attention_layernorm.weight")));
        }
        all.push(vector("model.norm.weight".into()));
        if !self.tie_word_embeddings {
            all.push(("lm_head.weight".into(), vec![self.vocab_size, self.hidden_size]));
        }
        all
    }
}

/// What the names of a block's tensors begin with.
pub fn block_prefix(layer: usize) -> String {
    format!("model.layers.{layer}.")
}

/// `config.json`, read key by key, with what is wrong noted down.
struct Keys<'a> {
    map: &'a Map<String, Value>,
    problems: Vec<String>,
}

impl Keys<'_> {
    fn refuse(&mut self) {
        let mut expect = |key: &str, expected: &str| match self.map.get(key) {
            Some(Value::String(s)) if s == expected => {}
            Some(found) => self.problems.push(format!("{key}: expected \"{expected}\", found {found}")),
            None => {}
        };
        expect("model_type", "llama");
        expect("hidden_act", "silu");
        self.problems.extend(stored_scheme(self.map).err());
        for (key, neutral) in REFUSED_UNLESS {
            match self.map.get(key) {
                None | Some(Value::Null | Value::Bool(false)) => {}
                Some(value) if neutral.is_some() && value.as_f64() == neutral => {}
                Some(found) => self.problems.push(format!("{key}: {found} is not supported")),
            }
        }
    }

    fn size(&mut self, key: &str) -> usize {
        if let Some(n) = self.whole(key) {
            return n;
        }
        if !self.map.contains_key(key) {
            self.problems.push(format!("{key}: missing"));
        }
        1
    }

    fn size_or(&mut self, key: &str, default: usize) -> usize {
        self.whole(key).unwrap_or(default)
    }

    /// A whole number in the range of real models, so that no product of two overflows.
    fn whole(&mut self, key: &str) -> Option<usize> {
        let value = self.map.get(key).filter(|v| !v.is_null())?;
        if let Some(n @ 1..=0xFFFF_FFFF) = value.as_u64() {
            Some(n as usize)
        } else {
            self.problems.push(format!("{key}: expected a whole number from 1, found {value}"));
            None
        }
    }

    fn number_or(&mut self, key: &str, default: f64) -> f64 {
        match self.map.get(key) {
            None | Some(Value::Null) => default,
            Some(value) => value.as_f64().filter(|n| *n > 0.0).unwrap_or_else(|| {
                self.problems.push(format!("{key}: expected a number above 0, found {value}"));
                default
            }),
        }
    }

    fn flag(&mut self, key: &str) -> bool {
        match self.map.get(key) {
            None | Some(Value::Null) => false,
            Some(Value::Bool(b)) => *b,
            Some(value) => {
                self.problems.push(format!("{key}: expected true or false, found {value}"));
                false
            }
        }
    }

    /// Theta and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and
    /// `rope_scaling` (before).
    fn rope(&mut self) -> (f64, RopeScaling) {
        let theta = self.number_or("rope_theta", 10_000.0);
        let nested = ["rope_parameters", "rope_scaling"].into_iter().find_map(|k| match self.map.get(k) {
            None | Some(Value::Null) => None,
            Some(Value::Object(o)) => Some((k, o)),
            Some(found) => {
                self.problems.push(format!("{k}: expected an object, found {found}"));
                None
            }
        });
        let Some((name, map)) = nested else { return (theta, RopeScaling::None) };
        let mut keys = Keys { map, problems: Vec::new() };
        let theta = keys.number_or("rope_theta", theta);
        let kind = match map.get("rope_type").or_else(|| map.get("type")) {
            None | Some(Value::Null) => "default".to_owned(),
            Some(Value::String(kind)) => kind.clone(),
            Some(found) => found.to_string(),
        };
        let mut required = |key: &str| {
            if !map.contains_key(key) {
                keys.problems.push(format!("{key}: missing"));
            }
            keys.number_or(key, 1.0)
        };
        let scaling = match kind.as_str() {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: required("factor") },
            "llama3" => RopeScaling::Llama3 {
                factor: required("factor"),
                low_freq_factor: required("low_freq_factor"),
                high_freq_factor: required("high_freq_factor"),
                original_context: required("original_max_position_embeddings"),
            },
            other => {
                keys.problems
                    .push(format!("rope_type: '{other}' is not supported (default, linear and llama3 are)"));
                RopeScaling::None
            }
        };
        self.problems.extend(keys.problems.into_iter().map(|p| format!("{name}.{p}")));
        (theta, scaling)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llama() -> Value {
        json!({"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
               "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 100, "rms_norm_eps": 1e-5})
    }

    fn problems(change: impl Fn(&mut Value)) -> String {
        let mut value = llama();
        change(&mut value);
        DecoderConfig::from_json(value.to_string().as_bytes()).unwrap_err().join("\n")
    }

    #[test]
    fn defaults_and_a_round_trip() {
        let mut config = DecoderConfig::from_json(llama().to_string().as_bytes()).unwrap();
        assert_eq!((config.head_dim, config.rope_theta, config.tie_word_embeddings), (8, 10_000.0, false));
        config.rope_scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192.0,
        };
        let again = DecoderConfig::from_json(config.to_json("float32").to_string().as_bytes()).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn what_would_change_the_result_is_refused_by_name() {
        assert!(problems(|c| c["model_type"] = "qwen2".into()).contains("model_type"));
        assert!(problems(|c| c["hidden_act"] = "gelu".into()).contains("hidden_act"));
        assert!(problems(|c| c["sliding_window"] = 4096.into()).contains("sliding_window: 4096"));
        let yarn = |c: &mut Value| c["rope_scaling"] = json!({"rope_type": "yarn", "factor": 2});
        assert!(problems(yarn).contains("'yarn'"));
        assert!(problems(|c| c["rope_scaling"] = json!({"type": "linear"})).contains("factor: missing"));
    }

    #[test]
    fn all_problems_are_told_at_once() {
        let told = problems(|c| {
            c["hidden_size"] = "32".into();
            c["num_key_value_heads"] = 3.into();
            c.as_object_mut().unwrap().remove("vocab_size");
        });
        for key in ["hidden_size", "num_key_value_heads 3", "vocab_size: missing"] {
            assert!(told.contains(key), "{told}");
        }
    }
}
