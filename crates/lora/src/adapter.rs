use std::collections::BTreeMap;
use std::ops::Range;

use burn::tensor::{Device, Tensor, TensorData};
use pronk_kernels::{Tracked, stream};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

use crate::{FixedFactors, InitLoraWeights, LoraConfig, LoraError, TensorName};

/// A module that could be adapted: a linear layer of the blocks, or one whose rows are the vocabulary's,
/// [`EMBED_TOKENS`](crate::EMBED_TOKENS) and [`LM_HEAD`](crate::LM_HEAD).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleShape {
    /// Its name in the checkpoint, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Features of its input.
    pub in_features: usize,
    /// Features of its output.
    pub out_features: usize,
    /// Set where the base has no such layer, but one that this is a part of.
    pub part_of: Option<PartOf>,
    /// Whether it has a bias.
    pub has_bias: bool,
    /// Whether its weight is that of the embeddings too.
    pub is_tied: bool,
}

/// Some rows of a packed layer, such as the queries' of `qkv_proj`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartOf {
    /// The packed layer's name.
    pub module: String,
    /// Its rows that make up the part.
    pub rows: Range<usize>,
}

impl ModuleShape {
    /// A layer of the base itself, without a bias.
    pub fn new(name: impl Into<String>, in_features: usize, out_features: usize) -> Self {
        Self { name: name.into(), in_features, out_features, part_of: None, has_bias: false, is_tied: false }
    }

    /// The layer of the base that computes it: itself, or the packed one that it is a part of.
    pub fn layer(&self) -> &str {
        self.part_of.as_ref().map_or(&self.name, |part| &part.module)
    }

    /// The same layer with `prefix` in front of all names.
    #[must_use]
    pub fn under(&self, prefix: &str) -> Self {
        let named = |name: &str| format!("{prefix}{name}");
        let part_of = self.part_of.as_ref();
        Self {
            name: named(&self.name),
            part_of: part_of.map(|part| PartOf { module: named(&part.module), rows: part.rows.clone() }),
            ..*self
        }
    }
}

/// One module's update, `scale * B A`, and with `DoRA` how long the rows are afterwards: float32 whatever the base holds.
#[derive(Debug, Clone)]
pub struct LoraPair {
    /// `[rank, in]`
    pub a: Tensor<2>,
    /// `[out, rank]`
    pub b: Tensor<2>,
    /// The factor in front of `B A`.
    pub scale: f64,
    /// `DoRA`'s norms of the rows of the updated weight, `[1, out]`.
    pub magnitude: Option<Tensor<2>>,
    /// What is added beside it and stays as it is.
    pub fixed: Option<FixedFactors>,
}

impl LoraPair {
    /// Rank of the update.
    pub fn rank(&self) -> usize {
        self.a.dims()[0]
    }
}

impl Tracked for LoraPair {
    fn tracked(self) -> Self {
        let magnitude = self.magnitude.map(Tracked::tracked);
        Self { a: self.a.tracked(), b: self.b.tracked(), magnitude, ..self }
    }
}

/// A low-rank update of a base, by module name.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// How it was made; ranks and scales are those of the pairs.
    pub config: LoraConfig,
    /// The update of every adapted module.
    pub pairs: BTreeMap<String, LoraPair>,
    /// Tensors that are trained whole, each in the place of the base's own: `modules_to_save`, and biases. Where the
    /// weight of the embeddings is that of the head too, it stands here once, as the embeddings'.
    pub whole: BTreeMap<TensorName, Tensor<2>>,
}

impl Adapter {
    /// A fresh adapter, initialized as PEFT does: A uniform in `±1 / sqrt(in)` (Kaiming with
    /// `a = sqrt 5`), or normal with `1 / rank`, B zero, so that training starts from the base itself.
    /// The starts that depend on the base's weights, too, are the base's to set.
    ///
    /// A module's numbers depend on the seed and its name alone, and are the same on every device.
    /// Magnitudes of `DoRA`, and what is trained whole, are not among them: they are the base's, which knows how to
    /// set them.
    pub fn init(
        config: &LoraConfig,
        modules: &[ModuleShape],
        seed: u64,
        device: &Device,
    ) -> Result<Self, LoraError> {
        config.validate()?;
        let pair = |module: &ModuleShape| {
            let rank = config.rank_of(&module.name);
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(stream(&module.name));
            let numbers = 0..rank * module.in_features;
            let a: Vec<f32> = if config.init_lora_weights == InitLoraWeights::Gaussian {
                numbers.map(|_| rng.sample::<f32, _>(StandardNormal) / rank as f32).collect()
            } else {
                let bound = 1.0 / (module.in_features as f32).sqrt();
                numbers.map(|_| rng.random_range(-bound..bound)).collect()
            };
            LoraPair {
                a: Tensor::from_data(TensorData::new(a, [rank, module.in_features]), device),
                b: Tensor::zeros([module.out_features, rank], device),
                scale: config.scale_of(&module.name),
                magnitude: None,
                fixed: None,
            }
        };
        let targets = config.select(modules)?;
        config.check_patterns(&targets)?;
        config.check_biases(modules)?;
        let pairs = targets.into_iter().map(|m| (m.name.clone(), pair(m))).collect();
        let config = LoraConfig { ensure_weight_tying: config.ties(modules), ..config.clone() };
        Ok(Self { config, pairs, whole: BTreeMap::new() })
    }

    /// The part that sits in the modules whose names begin with `prefix`, as leaves of a new
    /// autodiff graph.
    #[must_use]
    pub fn tracked_under(&self, prefix: &str) -> Self {
        let under = self.pairs.iter().filter(|(name, _)| name.starts_with(prefix));
        let pairs = under.map(|(name, pair)| (name.clone(), pair.clone().tracked())).collect();
        let under = self.whole.iter().filter(|(name, _)| name.module.starts_with(prefix));
        let whole = under.map(|(name, tensor)| (name.clone(), tensor.clone().tracked())).collect();
        Self { config: self.config.clone(), pairs, whole }
    }

    /// Numbers that training changes.
    pub fn parameters(&self) -> usize {
        self.tensors().map(|(_, tensor)| tensor.shape().num_elements()).sum()
    }
}
