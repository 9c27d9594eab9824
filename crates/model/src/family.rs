//! What sets one architecture apart from another. One decoder computes them all: it asks this
//! table, and the numbers of a `config.json`, never which family a base is of.

use pronk_kernels::Activation;

/// The architectures there are. Variants are named as transformers names its classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // the names say it
pub enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Gemma2,
    Gemma3,
    Phi3,
}

/// A row of the table.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(clippy::struct_excessive_bools)] // each is a column
pub struct Traits {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// The class in `architectures`.
    pub class: &'static str,
    /// `general.architecture` of a GGUF file.
    pub gguf: &'static str,
    /// What the feed-forward's gate becomes.
    pub activation: Activation,
    /// Names of the norms around attention and feed-forward.
    pub norms: [Norms; 2],
    /// Norms are stored less one. GGUF files hold them as they multiply.
    pub norms_less_one: bool,
    /// Queries and keys are normed, each head for itself.
    pub qk_norm: bool,
    /// Queries, keys and values have a bias, and outputs none, whatever `attention_bias` says.
    pub qkv_bias: bool,
    /// Queries, keys and values are one matrix, gate and up another.
    pub packed: bool,
    /// Embeddings are multiplied by the square root of their width.
    pub scaled_embeddings: bool,
    /// How `config.json` tells which blocks see a window only.
    pub window: WindowKeys,
    /// Keys of `config.json` that are computed here and refused for other families.
    pub keys: &'static [&'static str],
    /// What transformers takes for a key that is left out, where Llama's are others; flags are 0 or 1.
    pub defaults: &'static [(&'static str, f64)],
    /// llama.cpp's names of tensors within a block where Llama's are others, and Hugging Face's.
    pub gguf_names: &'static [(&'static str, &'static str)],
    /// Rows of queries and keys lie in another order in GGUF files.
    pub gguf_interleaved: bool,
}

/// The norms around one half of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Norms {
    /// Of its input.
    pub before: &'static str,
    /// Of its output, in front of the residual connection.
    pub after: Option<&'static str>,
}

/// How a `config.json` that does not list `layer_types` tells which blocks see a window only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WindowKeys {
    /// None does.
    None,
    /// All, where `sliding_window` is a number.
    All,
    /// Those from `max_window_layers` on, where `use_sliding_window` is true.
    From,
    /// All but the last of each `sliding_window_pattern`, where it is not given of so many.
    ButEvery(usize),
}

const fn before(name: &'static str) -> Norms {
    Norms { before: name, after: None }
}

const LLAMA: Traits = Traits {
    model_type: "llama",
    class: "LlamaForCausalLM",
    gguf: "llama",
    activation: Activation::Silu,
    norms: [before("input_layernorm"), before("post_attention_layernorm")],
    norms_less_one: false,
    qk_norm: false,
    qkv_bias: false,
    packed: false,
    scaled_embeddings: false,
    window: WindowKeys::None,
    keys: &[],
    defaults: &[],
    gguf_names: &[],
    gguf_interleaved: true,
};

const MISTRAL: Traits = Traits {
    model_type: "mistral",
    class: "MistralForCausalLM",
    // llama.cpp calls it llama: only a window tells the two apart.
    window: WindowKeys::All,
    keys: &["sliding_window"],
    defaults: &[("sliding_window", 4096.0)],
    ..LLAMA
};

const QWEN2: Traits = Traits {
    model_type: "qwen2",
    class: "Qwen2ForCausalLM",
    gguf: "qwen2",
    qkv_bias: true,
    window: WindowKeys::From,
    keys: &["sliding_window", "use_sliding_window"],
    defaults: &[("max_window_layers", 28.0), ("sliding_window", 4096.0)],
    gguf_interleaved: false,
    ..LLAMA
};

const QWEN3: Traits = Traits {
    model_type: "qwen3",
    class: "Qwen3ForCausalLM",
    gguf: "qwen3",
    qkv_bias: false,
    qk_norm: true,
    defaults: &[("head_dim", 128.0), ("max_window_layers", 28.0), ("sliding_window", 4096.0)],
    ..QWEN2
};

const GEMMA2: Traits = Traits {
    model_type: "gemma2",
    class: "Gemma2ForCausalLM",
    gguf: "gemma2",
    activation: Activation::GeluTanh,
    norms: [
        Norms { before: "input_layernorm", after: Some("post_attention_layernorm") },
        Norms { before: "pre_feedforward_layernorm", after: Some("post_feedforward_layernorm") },
    ],
    norms_less_one: true,
    scaled_embeddings: true,
    window: WindowKeys::ButEvery(2),
    keys: &["sliding_window", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"],
    defaults: &[
        ("head_dim", 256.0),
        ("sliding_window", 4096.0),
        ("query_pre_attn_scalar", 256.0),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("tie_word_embeddings", 1.0),
    ],
    gguf_names: &[
        ("post_attention_norm", "post_attention_layernorm"),
        ("ffn_norm", "pre_feedforward_layernorm"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
    ],
    gguf_interleaved: false,
    ..LLAMA
};

const GEMMA3: Traits = Traits {
    model_type: "gemma3_text",
    class: "Gemma3ForCausalLM",
    gguf: "gemma3",
    qk_norm: true,
    window: WindowKeys::ButEvery(6),
    defaults: &[
        ("head_dim", 256.0),
        ("sliding_window", 4096.0),
        ("query_pre_attn_scalar", 256.0),
        ("rope_theta", 1_000_000.0),
        ("rope_local_base_freq", 10_000.0),
        ("tie_word_embeddings", 1.0),
    ],
    ..GEMMA2
};

const PHI3: Traits = Traits {
    model_type: "phi3",
    class: "Phi3ForCausalLM",
    gguf: "phi3",
    packed: true,
    window: WindowKeys::All,
    keys: &["sliding_window"],
    gguf_names: &[("attn_qkv", "self_attn.qkv_proj"), ("ffn_up", "mlp.gate_up_proj")],
    gguf_interleaved: false,
    ..LLAMA
};

impl Family {
    /// All of them. Where two share a name in GGUF files, the one without a window comes first.
    pub const ALL: [Self; 7] =
        [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3, Self::Gemma2, Self::Gemma3, Self::Phi3];

    /// Its row of the table.
    pub(crate) const fn traits(self) -> &'static Traits {
        match self {
            Self::Llama => &LLAMA,
            Self::Mistral => &MISTRAL,
            Self::Qwen2 => &QWEN2,
            Self::Qwen3 => &QWEN3,
            Self::Gemma2 => &GEMMA2,
            Self::Gemma3 => &GEMMA3,
            Self::Phi3 => &PHI3,
        }
    }

    /// The family that a `model_type` of `config.json` names.
    pub fn of_model_type(model_type: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.traits().model_type == model_type)
    }

    /// The family that a `general.architecture` of a GGUF file names.
    pub fn of_gguf(architecture: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.traits().gguf == architecture)
    }
}

/// Names in messages, each in quotes.
pub fn listed(name: impl Fn(&Traits) -> &'static str) -> String {
    let mut names: Vec<String> =
        Family::ALL.into_iter().map(|family| format!("\"{}\"", name(family.traits()))).collect();
    names.dedup();
    names.join(", ")
}
