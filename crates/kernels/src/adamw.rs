use burn::tensor::Tensor;

/// `AdamW` (Loshchilov and Hutter 2019, <https://arxiv.org/abs/1711.05101>), in the order of
/// `torch.optim.AdamW`: decay first, then the bias-corrected step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Share of the learning rate that every weight shrinks by.
    pub weight_decay: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// Running moments of one parameter, each of its shape.
#[derive(Debug, Clone)]
pub struct AdamWState {
    /// First moment.
    pub m: Tensor<2>,
    /// Second moment.
    pub v: Tensor<2>,
}

impl AdamWState {
    /// Moments of a parameter that has not been stepped.
    pub fn zeros_like(parameter: &Tensor<2>) -> Self {
        Self { m: parameter.zeros_like(), v: parameter.zeros_like() }
    }
}

impl AdamW {
    /// The parameter after optimizer step number `step`, counted from one.
    pub fn step(
        &self,
        parameter: Tensor<2>,
        gradient: Tensor<2>,
        state: &mut AdamWState,
        learning_rate: f64,
        step: u64,
    ) -> Tensor<2> {
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        state.m = state.m.clone() * self.beta1 + gradient.clone() * (1.0 - self.beta1);
        state.v = state.v.clone() * self.beta2 + gradient.square() * (1.0 - self.beta2);
        let denominator = (state.v.clone() / correction(self.beta2)).sqrt() + self.eps;
        let update = state.m.clone() / denominator * (learning_rate / correction(self.beta1));
        parameter * (1.0 - learning_rate * self.weight_decay) - update
    }
}
