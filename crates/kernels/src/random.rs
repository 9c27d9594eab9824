use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Mutex, PoisonError};

use burn::tensor::{Distribution, Tensor};

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
        let keep = {
            let _guard = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
            device.seed(stream(&(self.key, name)));
            Tensor::<2>::random(x.dims(), Distribution::Uniform(0.0, 1.0), &device).greater_equal_elem(self.p)
        };
        x * (keep.float() / (1.0 - self.p))
    }
}
