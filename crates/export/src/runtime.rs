use std::fmt;
use std::str::FromStr;

use pronk_lora::{Adapter, TensorKind};
use pronk_model::{Base, Family, GgufAdapter};

use crate::ExportError;

/// Where an adapter is going to be loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    /// transformers with PEFT.
    Peft,
    /// llama.cpp, and what is built on it.
    Gguf,
    /// Apple's mlx-lm.
    Mlx,
    /// Ollama.
    Ollama,
    /// vLLM.
    Vllm,
    /// mistral.rs.
    MistralRs,
}

/// The rank that vLLM makes room for where nothing is said, and the ranks that it can be told.
const VLLM_RANKS: [usize; 8] = [16, 8, 32, 64, 128, 256, 320, 512];

impl Runtime {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Peft, Self::Gguf, Self::Mlx, Self::Ollama, Self::Vllm, Self::MistralRs];

    /// Why it could not load `adapter` onto `base`; each reason with what to do. Nothing where it can.
    pub fn refusals(self, base: &Base, adapter: &Adapter) -> Vec<String> {
        let merge = "merge the adapter into the base instead (pronk merge)";
        let mut refusals = Vec::new();
        let knows_dora = matches!(self, Self::Peft | Self::Mlx);
        if !knows_dora && adapter.pairs.values().any(|pair| pair.magnitude.is_some()) {
            refusals.push(format!("{self} knows no DoRA; {merge}"));
        }
        if let (false, Some(name)) = (self == Self::Peft, adapter.whole.keys().next()) {
            let knob = if name.kind == TensorKind::Bias { "lora.bias" } else { "lora.modules_to_save" };
            refusals.push(format!(
                "{name} is trained whole ({knob}), and {self} takes low-rank updates alone; {merge}"
            ));
        }
        match self {
            Self::Gguf | Self::Ollama => {
                let unknown = adapter.pairs.keys().find(|name| GgufAdapter::names(&base.config, name).is_none());
                refusals.extend(unknown.map(|name| format!("{name}: llama.cpp has no such tensor; {merge}")));
            }
            Self::MistralRs if base.gguf().is_some() => refusals.push(format!(
                "mistral.rs loads no LoRA adapter onto a GGUF file: give the Hugging Face directory that {} was made \
                 from, or merge (pronk merge --format gguf)",
                base.path.display()
            )),
            Self::MistralRs if base.config.family == Family::Gemma3 => {
                refusals.push("mistral.rs loads no text model of Gemma 3 alone".to_owned());
            }
            Self::Vllm => {
                let (rank, most) = (widest(adapter), VLLM_RANKS.into_iter().max().unwrap_or(0));
                if rank > most {
                    refusals.push(format!("rank {rank}: vLLM's largest is {most}; {merge}"));
                }
            }
            Self::Peft | Self::Mlx | Self::MistralRs => {}
        }
        refusals
    }

    /// What its user has to know.
    pub(crate) fn notes(self, base: &Base, adapter: &Adapter) -> Vec<String> {
        let mut notes = Vec::new();
        if matches!(self, Self::Peft | Self::Mlx | Self::Vllm) && base.gguf().is_some() {
            let path = base.path.display();
            notes.push(format!(
                "{self} wants the Hugging Face directory that {path} was made from as the base"
            ));
        }
        if let (Self::Peft, Some(rows)) =
            (self, adapter.vocab_size().filter(|rows| *rows > base.config.vocab_size))
        {
            notes.push(format!(
                "it has {rows} tokens, the base {}: model.resize_token_embeddings({rows}) comes before PeftModel",
                base.config.vocab_size
            ));
        }
        if let (Self::Vllm, Some(room)) = (self, Self::max_lora_rank(adapter)) {
            let rank = widest(adapter);
            notes.push(format!(
                "rank {rank} is over vLLM's default of 16: start it with --max-lora-rank {room}"
            ));
        }
        notes
    }

    /// What vLLM has to be told to make room for, where the ranks of `adapter` are above its default.
    pub fn max_lora_rank(adapter: &Adapter) -> Option<usize> {
        let rank = widest(adapter);
        let room = VLLM_RANKS.into_iter().filter(|room| *room >= rank).min().unwrap_or(rank);
        (rank > VLLM_RANKS[0]).then_some(room)
    }
}

/// The largest rank of its pairs in a file.
fn widest(adapter: &Adapter) -> usize {
    adapter.pairs.values().map(|pair| pair.rank() + pair.fixed_rank()).max().unwrap_or(0)
}

/// The name that `--to` takes.
impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Peft => "peft",
            Self::Gguf => "gguf",
            Self::Mlx => "mlx",
            Self::Ollama => "ollama",
            Self::Vllm => "vllm",
            Self::MistralRs => "mistralrs",
        })
    }
}

impl FromStr for Runtime {
    type Err = ExportError;

    fn from_str(name: &str) -> Result<Self, ExportError> {
        let known = Self::ALL.into_iter().find(|runtime| runtime.to_string() == name);
        known.ok_or_else(|| ExportError::UnknownRuntime { found: name.into() })
    }
}
