use std::collections::BTreeMap;

use pronk_kernels::{AdamW, AdamWState};
use pronk_lora::{Adapter, LoraPair};

use crate::Gradients;

/// `AdamW` over a whole adapter.
#[derive(Debug, Clone)]
pub struct Optimizer {
    adamw: AdamW,
    /// Moments of A and of B, by module name.
    pub(crate) moments: BTreeMap<String, (AdamWState, AdamWState)>,
}

impl Optimizer {
    /// Moments at zero.
    pub fn new(weight_decay: f64, adapter: &Adapter) -> Self {
        let zero = |p: &LoraPair| (AdamWState::zeros_like(&p.a), AdamWState::zeros_like(&p.b));
        let moments = adapter.pairs.iter().map(|(name, pair)| (name.clone(), zero(pair))).collect();
        Self { adamw: AdamW { weight_decay, ..AdamW::default() }, moments }
    }

    /// Optimizer step number `step`, counted from one.
    pub fn step(&mut self, adapter: &mut Adapter, gradients: &Gradients, learning_rate: f64, step: u64) {
        for (name, pair) in &mut adapter.pairs {
            let (Some(gradient), Some((a, b))) = (gradients.pairs.get(name), self.moments.get_mut(name))
            else {
                continue;
            };
            let adamw = self.adamw;
            pair.a = adamw.step(pair.a.clone(), gradient.a.clone(), a, learning_rate, step);
            pair.b = adamw.step(pair.b.clone(), gradient.b.clone(), b, learning_rate, step);
        }
    }
}
