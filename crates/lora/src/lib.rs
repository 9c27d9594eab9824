//! Low-rank adapters over a frozen base (Hu et al. 2021, <https://arxiv.org/abs/2106.09685>).
//!
//! A [`LoraLinear`] computes `base(x) + scale * (x A^T) B^T` on the activation path: the dense
//! product `B A` never exists while training, with `DoRA` neither. Its weights live in an [`Adapter`], by the
//! module's name, so that the base can come and go (resident, quantized, streamed) while the
//! adapter stays. Adapter directories have the layout of Hugging Face's PEFT.

mod adapter;
mod combine;
mod config;
mod described;
mod dora;
mod error;
mod factors;
mod fixed;
mod init;
mod linear;
mod packed;
mod patterns;
mod peft;
mod summary;
mod tensors;
mod whole;

pub use adapter::{Adapter, LoraPair, ModuleShape, PartOf};
pub use combine::Combination;
pub use config::{AllLinear, LoraConfig, ModuleNames, TargetModules};
pub use dora::WeightNorms;
pub use error::LoraError;
pub use factors::{LowRankFactors, low_rank_factors, low_rank_factors_over};
pub use fixed::{FixedFactors, Sought};
pub use init::{InitLoraWeights, LoftQConfig};
pub use linear::{ForwardMode, LayerInputs, LoraLinear, low_rank_update};
pub use patterns::Patterns;
pub use peft::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFiles, base_of, loftq_config_of, vocab_size_of};
pub use summary::ModuleSummary;
pub use tensors::{TensorKind, TensorName};
pub use whole::{EMBED_TOKENS, LM_HEAD, TrainedBiases};
