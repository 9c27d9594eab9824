//! `init_lora_weights`: the factors that training starts from.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How often the directions are turned where nobody says: more finds hardly more of the largest singular values.
const TURNS: usize = 8;

/// What A and B hold before the first step, by PEFT's names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Given", into = "String")]
pub enum InitLoraWeights {
    /// A uniform in `±1 / sqrt(in)`, B zero.
    #[default]
    Default,
    /// A normal with a deviation of `1 / rank`, B zero.
    Gaussian,
    /// The largest singular values of the base's own weight, which then trains without them (Meng et al. 2024,
    /// <https://arxiv.org/abs/2404.02948>); the number is PEFT's `niter`.
    Pissa(Option<usize>),
    /// The largest singular values of what a quantized base has lost (Li et al. 2023,
    /// <https://arxiv.org/abs/2310.08659>).
    LoftQ,
    /// Of what a quantized base has lost that part which changes its layers' outputs most, over the inputs that they
    /// have on records of the run (Zhang et al. 2024, <https://arxiv.org/abs/2410.06040>).
    Qera,
}

impl InitLoraWeights {
    /// How often the directions of [`low_rank_factors`](crate::low_rank_factors) are turned.
    pub fn turns(self) -> usize {
        match self {
            Self::Pissa(Some(niter)) => niter,
            _ => TURNS,
        }
    }

    /// Whether the update is zero before the first step, whatever the base's weights are.
    pub fn starts_from_zero(self) -> bool {
        matches!(self, Self::Default | Self::Gaussian)
    }

    /// Whether the factors that training starts from are taken away from the base again.
    pub fn keeps_start(self) -> bool {
        matches!(self, Self::Pissa(_))
    }
}

impl fmt::Display for InitLoraWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::Gaussian => f.write_str("gaussian"),
            Self::Pissa(None) => f.write_str("pissa"),
            Self::Pissa(Some(niter)) => write!(f, "pissa_niter_{niter}"),
            Self::LoftQ => f.write_str("loftq"),
            Self::Qera => f.write_str("qera"),
        }
    }
}

impl From<InitLoraWeights> for String {
    fn from(init: InitLoraWeights) -> Self {
        init.to_string()
    }
}

/// PEFT takes `True` for its default.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected one of its words")]
enum Given {
    Flag(bool),
    Word(String),
}

impl TryFrom<Given> for InitLoraWeights {
    type Error = &'static str;

    fn try_from(given: Given) -> Result<Self, Self::Error> {
        let word = match given {
            Given::Flag(true) => return Ok(Self::Default),
            Given::Flag(false) => String::new(),
            Given::Word(word) => word.to_lowercase(),
        };
        let niter = word.strip_prefix("pissa_niter_").and_then(|niter| niter.parse().ok());
        match (word.as_str(), niter) {
            ("default", _) => Ok(Self::Default),
            ("gaussian", _) => Ok(Self::Gaussian),
            ("pissa", _) => Ok(Self::Pissa(None)),
            ("loftq", _) => Ok(Self::LoftQ),
            ("qera", _) => Ok(Self::Qera),
            (_, Some(niter)) => Ok(Self::Pissa(Some(niter))),
            _ => Err(
                "expected \"default\", \"gaussian\", \"pissa\", \"pissa_niter_16\" (or another number), \"loftq\" or \"qera\"",
            ),
        }
    }
}

/// `loftq_config`: set where the adapter belongs to a quantized base, not to the base as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoftQConfig {
    /// Bits that the base is quantized to.
    pub loftq_bits: u8,
    /// How often base and factors were fitted to each other.
    #[serde(default = "once")]
    pub loftq_iter: usize,
    /// Layers of it that were left in 16 bits. PEFT does not know of these.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skip_modules: Vec<String>,
}

fn once() -> usize {
    1
}
