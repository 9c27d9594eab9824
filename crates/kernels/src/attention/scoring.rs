use crate::exp::tanh;
use crate::frozen::{Precision, wide::widest};

/// What a query and a key make a score of, and which keys a query has scores with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scoring {
    /// The product of query and key is multiplied by it: `1 / sqrt(head_dim)` in most models.
    pub scale: f32,
    /// With a cap `c`, scores become `c * tanh(score / c)` (Gemma 2).
    pub soft_cap: Option<f32>,
    /// How many keys a query sees at most, its own token's and those before it (Mistral).
    pub window: Option<usize>,
    /// What factors of the products are rounded to.
    pub precision: Precision,
}

impl Scoring {
    /// `q k^T / sqrt(head_dim)`, of all keys so far, in float32.
    pub fn of_heads(head_dim: usize) -> Self {
        Self {
            scale: (head_dim as f32).sqrt().recip(),
            soft_cap: None,
            window: None,
            precision: Precision::F32,
        }
    }

    /// The first key that is seen where `keys` are there so far.
    pub(crate) fn first(self, keys: usize) -> usize {
        self.window.map_or(0, |window| keys.saturating_sub(window))
    }
}

/// Caps `scores`, and puts the slope of the cap at each in `slopes`: `1 - tanh(score / c)^2`.
pub fn cap(scores: &mut [f32], c: f32, slopes: &mut Vec<f32>) {
    slopes.resize(scores.len(), 0.0);
    widest!(|| {
        for (score, slope) in scores.iter_mut().zip(slopes) {
            let tanh = tanh(*score / c);
            *score = c * tanh;
            *slope = 1.0 - tanh * tanh;
        }
    });
}
