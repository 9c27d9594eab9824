use burn::tensor::Tensor;

/// Lion (Chen et al. 2023, <https://arxiv.org/abs/2302.06675>): the sign of an average of momentum and
/// gradient, so that every number moves by the learning rate. It wants a smaller one than `AdamW`,
/// three to ten times so.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lion {
    /// Share of the momentum in the step.
    pub beta1: f64,
    /// Decay of the momentum.
    pub beta2: f64,
    /// Share of the learning rate that every weight shrinks by.
    pub weight_decay: f64,
}

impl Default for Lion {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.99, weight_decay: 0.0 }
    }
}

impl Lion {
    /// The parameter after a step; `momentum` has its shape, and is zero before the first.
    pub fn step(
        &self,
        parameter: Tensor<2>,
        gradient: Tensor<2>,
        momentum: &mut Tensor<2>,
        learning_rate: f64,
    ) -> Tensor<2> {
        let update = momentum.clone() * self.beta1 + gradient.clone() * (1.0 - self.beta1);
        *momentum = momentum.clone() * self.beta2 + gradient * (1.0 - self.beta2);
        parameter * (1.0 - learning_rate * self.weight_decay) - update.sign() * learning_rate
    }
}
