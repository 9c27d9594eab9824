use pronk_kernels::{Activation, RopeScaling};
use serde_json::{Map, Value};

use crate::bitsandbytes::stored_scheme;
use crate::family::{Family, listed};

/// Keys that would change the result, beside the value that leaves it alone.
const REFUSED_UNLESS: [(&str, Option<f64>); 22] = [
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
    ("use_bidirectional_attention", None),
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

/// What `rope_parameters` has for the blocks that see everything, and for those that see a window,
/// where the two turn differently.
const FULL: &str = "full_attention";
const LOCAL: &str = "sliding_attention";

/// `config.json`, read key by key, with what is wrong noted down.
pub struct Keys {
    map: Map<String, Value>,
    problems: Vec<String>,
}

/// The name of an activation under `hidden_act`.
pub fn activation_name(activation: Activation) -> &'static str {
    match activation {
        Activation::Silu => "silu",
        Activation::GeluTanh => "gelu_pytorch_tanh",
    }
}

impl Keys {
    /// The keys of a configuration, with those that its family leaves out, and the family.
    pub fn of_family(mut map: Map<String, Value>) -> (Self, Family) {
        let mut problems = Vec::new();
        let family = match map.get("model_type") {
            None => Family::Llama,
            Some(found) => found.as_str().and_then(Family::of_model_type).unwrap_or_else(|| {
                let expected = listed(|traits| traits.model_type);
                problems.push(format!("model_type: expected one of {expected}, found {found}"));
                Family::Llama
            }),
        };
        for &(key, default) in family.traits().defaults {
            let flag = key == "tie_word_embeddings";
            let value = if flag { Value::from(default > 0.0) } else { Value::from(default) };
            map.entry(key).or_insert(value);
        }
        (Self { map, problems }, family)
    }

    fn nested(map: Map<String, Value>) -> Self {
        Self { map, problems: Vec::new() }
    }

    /// All that was wrong.
    pub fn problems(self) -> Vec<String> {
        self.problems
    }

    pub fn problem(&mut self, problem: String) {
        self.problems.push(problem);
    }

    /// Refuses what is not computed for `family`.
    pub fn refuse(&mut self, family: Family) {
        let expected = activation_name(family.traits().activation);
        // Where both are there, Gemma's own key goes before a default that others have left.
        let keys = ["hidden_activation", "hidden_act"];
        let found = keys.into_iter().find_map(|k| Some((k, self.map.get(k).filter(|v| !v.is_null())?)));
        if let Some((key, found)) = found.filter(|(_, found)| found.as_str() != Some(expected)) {
            self.problems.push(format!("{key}: expected \"{expected}\", found {found}"));
        }
        self.problems.extend(stored_scheme(&self.map).err());
        for (key, neutral) in REFUSED_UNLESS {
            match self.map.get(key) {
                _ if family.traits().keys.contains(&key) => {}
                None | Some(Value::Null | Value::Bool(false)) => {}
                Some(value) if neutral.is_some() && value.as_f64() == neutral => {}
                Some(found) => self.problems.push(format!("{key}: {found} is not supported")),
            }
        }
    }

    pub fn size(&mut self, key: &str) -> usize {
        if let Some(n) = self.size_or_none(key) {
            return n;
        }
        if !self.map.contains_key(key) {
            self.problems.push(format!("{key}: missing"));
        }
        1
    }

    pub fn size_or(&mut self, key: &str, default: usize) -> usize {
        self.size_or_none(key).unwrap_or(default)
    }

    /// A whole number in the range of real models, so that no product of two overflows.
    pub fn size_or_none(&mut self, key: &str) -> Option<usize> {
        self.whole(key, 1)
    }

    /// A whole number from 0; 0 where there is none.
    pub fn whole_from_0(&mut self, key: &str) -> usize {
        self.whole(key, 0).unwrap_or(0)
    }

    fn whole(&mut self, key: &str, least: usize) -> Option<usize> {
        let value = self.map.get(key).filter(|v| !v.is_null())?;
        // Some writers, and the table of families, have a fraction of zero behind it.
        let whole =
            value.as_f64().filter(|n| n.fract() == 0.0 && (least as f64..=f64::from(u32::MAX)).contains(n));
        if whole.is_none() {
            self.problems.push(format!("{key}: expected a whole number from {least}, found {value}"));
        }
        whole.map(|n| n as usize)
    }

    pub fn number_or(&mut self, key: &str, default: f64) -> f64 {
        self.number(key).unwrap_or(default)
    }

    pub fn number(&mut self, key: &str) -> Option<f64> {
        let value = self.map.get(key).filter(|v| !v.is_null())?;
        let number = value.as_f64().filter(|n| *n > 0.0);
        if number.is_none() {
            self.problems.push(format!("{key}: expected a number above 0, found {value}"));
        }
        number
    }

    pub fn flag(&mut self, key: &str) -> bool {
        match self.map.get(key) {
            None | Some(Value::Null) => false,
            Some(Value::Bool(b)) => *b,
            Some(value) => {
                self.problems.push(format!("{key}: expected true or false, found {value}"));
                false
            }
        }
    }

    /// Of each block, whether `layer_types` gives it a window.
    pub fn layer_types(&mut self) -> Option<Vec<bool>> {
        let value = self.map.get("layer_types").filter(|v| !v.is_null())?;
        let kind = |name: &Value| match name.as_str() {
            Some(FULL) => Some(false),
            Some(LOCAL) => Some(true),
            _ => None,
        };
        let kinds = value.as_array().and_then(|names| names.iter().map(kind).collect());
        if kinds.is_none() {
            let problem =
                format!("layer_types: expected a list of \"{FULL}\" and \"{LOCAL}\", found {value}");
            self.problems.push(problem);
        }
        kinds
    }

    /// Theta and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and
    /// `rope_scaling` (before), and the theta of blocks with a window where it is another.
    pub fn rope(&mut self) -> (f64, RopeScaling, Option<f64>) {
        let theta = self.number_or("rope_theta", 10_000.0);
        let local = self.number("rope_local_base_freq");
        let nested = ["rope_parameters", "rope_scaling"].into_iter().find_map(|k| match self.map.get(k) {
            None | Some(Value::Null) => None,
            Some(Value::Object(o)) => Some((k.to_owned(), o.clone())),
            Some(found) => {
                self.problems.push(format!("{k}: expected an object, found {found}"));
                None
            }
        });
        let Some((name, map)) = nested else { return (theta, RopeScaling::None, local) };
        let Some(Value::Object(full)) = map.get(FULL) else {
            let (theta, scaling) = self.one_rope(&name, map, theta);
            return (theta, scaling, local);
        };
        let (theta, scaling) = self.one_rope(&format!("{name}.{FULL}"), full.clone(), theta);
        let Some(Value::Object(own)) = map.get(LOCAL) else { return (theta, scaling, local) };
        let name = format!("{name}.{LOCAL}");
        let (local, local_scaling) = self.one_rope(&name, own.clone(), local.unwrap_or(theta));
        if local_scaling != RopeScaling::None {
            self.problems.push(format!("{name}.rope_type: expected \"default\""));
        }
        (theta, scaling, Some(local))
    }

    /// Theta and scaling of one kind of blocks.
    fn one_rope(&mut self, name: &str, map: Map<String, Value>, theta: f64) -> (f64, RopeScaling) {
        let kind = match map.get("rope_type").or_else(|| map.get("type")) {
            None | Some(Value::Null) => "default".to_owned(),
            Some(Value::String(kind)) => kind.clone(),
            Some(found) => found.to_string(),
        };
        let mut keys = Self::nested(map);
        let theta = keys.number_or("rope_theta", theta);
        if let Some(found) = keys.number("partial_rotary_factor").filter(|n| (n - 1.0).abs() > 0.0) {
            keys.problem(format!("partial_rotary_factor: {found} is not supported"));
        }
        let mut required = |key: &str| {
            if !keys.map.contains_key(key) {
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
