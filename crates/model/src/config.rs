//! The decoder's description, from `config.json` or from a GGUF file's metadata.

mod json;
mod keys;
mod window;

use pronk_kernels::{Precision, RopeScaling, Scoring};
use pronk_lora::{Adapter, EMBED_TOKENS, LM_HEAD, ModuleShape, PartOf};
use serde_json::Value;

use self::keys::Keys;
use crate::family::{Family, Norms, Traits};

pub use self::window::{SlidingWindow, Windowed};

/// A decoder. Field names are those of Hugging Face's `config.json`; what its numbers do not tell
/// stands in the table of [`Family`].
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // the names say it
pub struct DecoderConfig {
    pub family: Family,
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
    /// Of the blocks that see a window only, where it is another; there positions are not scaled.
    pub rope_local_base_freq: Option<f64>,
    pub sliding_window: Option<SlidingWindow>,
    /// Scores are divided by its square root, where it is not that of `head_dim`.
    pub query_pre_attn_scalar: Option<f64>,
    pub attn_logit_softcapping: Option<f64>,
    pub final_logit_softcapping: Option<f64>,
    pub tie_word_embeddings: bool,
    pub attention_bias: bool,
    pub mlp_bias: bool,
}

/// Far more than any decoder has. The names of four billion layers would fill the memory before
/// the first of them is found missing.
pub const MOST_LAYERS: usize = 1024;

impl DecoderConfig {
    /// Reads `config.json`. Whatever would change the result and is not computed here is
    /// refused by name, all of it at once.
    pub fn from_json(text: &[u8]) -> Result<Self, Vec<String>> {
        let value: Value =
            serde_json::from_slice(text).map_err(|e| vec![format!("not a JSON document ({e})")])?;
        let Value::Object(map) = value else { return Err(vec!["expected a JSON object".into()]) };
        let (mut keys, family) = Keys::of_family(map);
        keys.refuse(family);
        let (rope_theta, rope_scaling, rope_local_base_freq) = keys.rope();
        let hidden_size = keys.size("hidden_size");
        let num_hidden_layers = keys.size("num_hidden_layers");
        let num_attention_heads = keys.size("num_attention_heads");
        let head_dim = keys.size_or("head_dim", hidden_size / num_attention_heads.max(1));
        let config = Self {
            family,
            vocab_size: keys.size("vocab_size"),
            hidden_size,
            intermediate_size: keys.size("intermediate_size"),
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads: keys.size_or("num_key_value_heads", num_attention_heads),
            head_dim,
            max_position_embeddings: keys.size_or("max_position_embeddings", 2048),
            rms_norm_eps: keys.number_or("rms_norm_eps", 1e-6),
            rope_theta,
            rope_scaling,
            rope_local_base_freq,
            sliding_window: keys.sliding_window(family, num_hidden_layers),
            query_pre_attn_scalar: keys.number("query_pre_attn_scalar"),
            attn_logit_softcapping: keys.number("attn_logit_softcapping"),
            final_logit_softcapping: keys.number("final_logit_softcapping"),
            tie_word_embeddings: keys.flag("tie_word_embeddings"),
            attention_bias: keys.flag("attention_bias"),
            mlp_bias: keys.flag("mlp_bias"),
        };
        let mut problems = keys.problems();
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

    /// What sets its family apart.
    pub(crate) fn traits(&self) -> &'static Traits {
        self.family.traits()
    }

    /// How many tokens a block's queries see at most.
    pub(crate) fn window(&self, layer: usize) -> Option<usize> {
        self.sliding_window.filter(|window| window.blocks.contains(layer)).map(|window| window.size)
    }

    /// How the block at `layer` scores queries and keys, with factors rounded to `precision`.
    pub(crate) fn scoring(&self, layer: usize, precision: Precision) -> Scoring {
        let scale = self.query_pre_attn_scalar.unwrap_or(self.head_dim as f64).sqrt().recip();
        Scoring {
            scale: scale as f32,
            soft_cap: self.attn_logit_softcapping.map(|cap| cap as f32),
            window: self.window(layer),
            precision,
        }
    }

    /// How many norms a block has of outputs, in front of a residual connection.
    pub fn norms_of_outputs(&self) -> usize {
        self.traits().norms.iter().filter(|norms| norms.after.is_some()).count()
    }

    /// Whether queries and keys are normed, each head for itself.
    pub fn norms_heads(&self) -> bool {
        self.traits().qk_norm
    }

    /// Features of all queries of a token, and of all its keys.
    pub fn attention_widths(&self) -> [usize; 2] {
        [self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim]
    }

    /// The linear layers of the blocks, in the order in which they run.
    pub fn linear_modules(&self) -> Vec<ModuleShape> {
        self.blocks_modules(&self.block_linears())
    }

    /// What an adapter may sit on, or hold whole: the linear layers, the parts of packed ones under the names
    /// that they have where they are apart, embeddings and head.
    pub fn adapter_modules(&self) -> Vec<ModuleShape> {
        let mut modules = self.block_linears();
        modules.extend(self.block_parts());
        let mut modules = self.blocks_modules(&modules);
        let vocabulary = |name| ModuleShape::new(name, self.hidden_size, self.vocab_size);
        modules.push(vocabulary(EMBED_TOKENS));
        modules.push(ModuleShape { is_tied: self.tie_word_embeddings, ..vocabulary(LM_HEAD) });
        modules
    }

    /// What the checkpoint calls the output projection's weight: the embeddings', where they are one.
    pub fn head_weight(&self) -> &'static str {
        if self.tie_word_embeddings { EMBEDDINGS } else { HEAD }
    }

    /// What the model looks like with `adapter`: it may know more tokens, and a head that was trained apart is tied no
    /// more.
    #[must_use]
    pub fn tuned_by(&self, adapter: &Adapter) -> Self {
        let vocab_size = adapter.vocab_size().unwrap_or(self.vocab_size);
        let stays_tied = adapter.config.ensure_weight_tying || adapter.vocab_size().is_none();
        let tie_word_embeddings = self.tie_word_embeddings && stays_tied;
        Self { vocab_size, tie_word_embeddings, ..self.clone() }
    }

    fn block_linears(&self) -> Vec<ModuleShape> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let [q, kv] = self.attention_widths();
        let linears: &[(&str, usize, usize)] = if self.traits().packed {
            &[
                (QKV_PROJ, hidden, q + 2 * kv),
                ("self_attn.o_proj", q, hidden),
                (GATE_UP_PROJ, hidden, 2 * inner),
                ("mlp.down_proj", inner, hidden),
            ]
        } else {
            &[
                (QKV[0], hidden, q),
                (QKV[1], hidden, kv),
                (QKV[2], hidden, kv),
                ("self_attn.o_proj", q, hidden),
                (GATE_UP[0], hidden, inner),
                (GATE_UP[1], hidden, inner),
                ("mlp.down_proj", inner, hidden),
            ]
        };
        let shape = |&(name, input, output): &(&str, usize, usize)| ModuleShape {
            has_bias: self.has_bias(name),
            ..ModuleShape::new(name, input, output)
        };
        linears.iter().map(shape).collect()
    }

    fn block_parts(&self) -> Vec<ModuleShape> {
        if !self.traits().packed {
            return Vec::new();
        }
        let [q, kv] = self.attention_widths();
        let inner = self.intermediate_size;
        let parts = |names: &[&str], widths: &[usize], packed: &str| -> Vec<ModuleShape> {
            let starts = widths.iter().scan(0, |end, width| {
                *end += width;
                Some(*end - width)
            });
            let parts = names.iter().zip(widths).zip(starts);
            parts
                .map(|((name, &width), start)| ModuleShape {
                    part_of: Some(PartOf { module: packed.to_owned(), rows: start..start + width }),
                    ..ModuleShape::new(*name, self.hidden_size, width)
                })
                .collect()
        };
        [parts(&QKV, &[q, kv, kv], QKV_PROJ), parts(&GATE_UP, &[inner, inner], GATE_UP_PROJ)].concat()
    }

    /// The modules of one block, for each block.
    fn blocks_modules(&self, modules: &[ModuleShape]) -> Vec<ModuleShape> {
        let in_block = |layer: usize| {
            let prefix = block_prefix(layer);
            modules.iter().map(move |module| module.under(&prefix))
        };
        (0..self.num_hidden_layers).flat_map(in_block).collect()
    }

    /// Whether a linear layer of this name has a bias.
    pub(crate) fn has_bias(&self, module: &str) -> bool {
        if module.contains("mlp.") {
            self.mlp_bias
        } else {
            self.attention_bias || (self.traits().qkv_bias && QKV.iter().any(|name| module.ends_with(name)))
        }
    }

    /// Every tensor that the checkpoint must hold, with its shape.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let vector = |name: String| (name, vec![self.hidden_size]);
        let mut all = vec![(EMBEDDINGS.to_owned(), vec![self.vocab_size, self.hidden_size])];
        for module in self.linear_modules() {
            if self.has_bias(&module.name) {
                all.push((format!("{}.bias", module.name), vec![module.out_features]));
            }
            all.push((format!("{}.weight", module.name), vec![module.out_features, module.in_features]));
        }
        let norms = self.traits().norms.iter().flat_map(|Norms { before, after }| [Some(*before), *after]);
        let norms: Vec<&str> = norms.flatten().collect();
        let head_norms: &[&str] = if self.traits().qk_norm { &QK_NORMS } else { &[] };
        for prefix in (0..self.num_hidden_layers).map(block_prefix) {
            all.extend(norms.iter().map(|name| vector(format!("{prefix}{name}.weight"))));
            all.extend(head_norms.iter().map(|name| (format!("{prefix}{name}.weight"), vec![self.head_dim])));
        }
        all.push(vector("model.norm.weight".into()));
        if !self.tie_word_embeddings {
            all.push((HEAD.into(), vec![self.vocab_size, self.hidden_size]));
        }
        all
    }
}

/// The weight of the embeddings, `[vocab, hidden]`.
pub const EMBEDDINGS: &str = "model.embed_tokens.weight";
/// The output projection's, `[vocab, hidden]`, where it is not the embeddings'.
pub const HEAD: &str = "lm_head.weight";
/// Queries, keys and values, where they are apart, and where they are one matrix.
pub const QKV: [&str; 3] = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
pub const QKV_PROJ: &str = "self_attn.qkv_proj";
/// Gate and up, where they are apart, and where they are one matrix.
pub const GATE_UP: [&str; 2] = ["mlp.gate_proj", "mlp.up_proj"];
pub const GATE_UP_PROJ: &str = "mlp.gate_up_proj";
/// Norms of each head of the queries and of the keys.
pub const QK_NORMS: [&str; 2] = ["self_attn.q_norm", "self_attn.k_norm"];

/// What the names of a block's tensors begin with.
pub fn block_prefix(layer: usize) -> String {
    format!("model.layers.{layer}.")
}

#[cfg(test)]
mod tests;
