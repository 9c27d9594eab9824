use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use burn::tensor::{Device, Distribution, Tensor, TensorData};

/// A number for a place in the run or in the model, to seed a generator with: random numbers
/// that depend on where they are used, never on what was drawn before.
pub fn stream(place: &impl Hash) -> u64 {
    // `DefaultHasher::new` has fixed keys: the same number in every process.
    let mut hasher = DefaultHasher::new();
    place.hash(&mut hasher);
    hasher.finish()
}

/// What a mask depends on, and nothing else: the same key draws the same mask, whether a block
/// runs for the first time, is recomputed for its gradients, or belongs to a resumed run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DropoutKey {
    /// The run's seed.
    pub seed: u64,
    /// The optimizer step.
    pub step: u64,
    /// The micro-batch within the step.
    pub micro_batch: u64,
}

/// Inverted dropout with probability `p` (Srivastava et al. 2014).
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    /// Share of the features set to zero, in `[0, 1)`.
    pub p: f64,
    /// Where in the run the masks belong.
    pub key: DropoutKey,
}

/// Backends draw from one generator for the whole process: seeding and drawing must not be
/// interleaved with another thread's.
static GENERATOR: Mutex<()> = Mutex::new(());

impl Dropout {
    /// `x` with its mask for the layer called `name`, the kept features scaled by `1 / (1 - p)`.
    pub fn apply(&self, x: Tensor<2>, name: &str) -> Tensor<2> {
        if self.p == 0.0 {
            return x;
        }
        let device = x.device().without_autodiff();
        let keep = uniform(x.dims(), [0.0, 1.0], &(self.key, name), &device).greater_equal_elem(self.p);
        x * (keep.float() / (1.0 - self.p))
    }
}

/// Uniform numbers that depend on `place` alone.
fn uniform(shape: [usize; 2], [low, high]: [f64; 2], place: &impl Hash, device: &Device) -> Tensor<2> {
    let _guard = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    device.seed(stream(place));
    Tensor::random(shape, Distribution::Uniform(low, high), device)
}

/// Noise on the embeddings of what is learned from (NEFTune, Jain et al. 2023,
/// <https://arxiv.org/abs/2310.05914>).
#[derive(Debug, Clone, Copy)]
pub struct EmbeddingNoise {
    /// Its size: numbers are within `alpha / sqrt(L d)` of zero, for a record of `L` tokens and
    /// embeddings of `d` numbers.
    pub alpha: f64,
    /// Where in the run it belongs.
    pub key: DropoutKey,
}

impl EmbeddingNoise {
    /// `x`, `[tokens, d]`, with its noise; `documents` are the rows of each record, one after another.
    pub fn apply(&self, x: Tensor<2>, documents: &[Range<usize>]) -> Tensor<2> {
        let [tokens, d] = x.dims();
        let device = x.device();
        let bound = |document: &Range<usize>| (self.alpha / ((document.len() * d) as f64).sqrt()) as f32;
        let bounds: Vec<f32> = documents.iter().flat_map(|doc| doc.clone().map(|_| bound(doc))).collect();
        let bounds = Tensor::<2>::from_data(TensorData::new(bounds, [tokens, 1]), &device);
        x + uniform([tokens, d], [-1.0, 1.0], &(self.key, "embeddings"), &device) * bounds
    }
}
