use burn::tensor::Tensor;

/// Of the quintic that pulls singular values towards 1, and how often it is applied.
const QUINTIC: [f64; 3] = [3.4445, -4.775, 2.0315];
const ROUNDS: usize = 5;

/// Muon (Jordan et al. 2024, <https://kellerjordan.github.io/posts/muon/>): momentum whose singular
/// values are all made about 1, by Newton and Schulz' iteration, before it is taken as the step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Muon {
    /// Decay of the momentum.
    pub beta: f64,
    /// Share of the learning rate that every weight shrinks by.
    pub weight_decay: f64,
}

impl Default for Muon {
    fn default() -> Self {
        Self { beta: 0.95, weight_decay: 0.0 }
    }
}

impl Muon {
    /// The parameter after a step with Nesterov's look ahead; `momentum` has its shape, and is zero
    /// before the first.
    pub fn step(
        &self,
        parameter: Tensor<2>,
        gradient: &Tensor<2>,
        momentum: &mut Tensor<2>,
        learning_rate: f64,
    ) -> Tensor<2> {
        let [rows, cols] = parameter.dims();
        let towards =
            |to: &Tensor<2>, from: &Tensor<2>| to.clone() * (1.0 - self.beta) + from.clone() * self.beta;
        *momentum = towards(gradient, momentum);
        let update = orthogonalized(towards(gradient, momentum));
        // Tall matrices take larger steps, so that outputs move alike whatever the shape.
        let scale = (rows as f64 / cols as f64).max(1.0).sqrt();
        parameter * (1.0 - learning_rate * self.weight_decay) - update * (learning_rate * scale)
    }
}

/// `x` with singular values near 1 (between about 0.7 and 1.2) in the place of its own.
fn orthogonalized(x: Tensor<2>) -> Tensor<2> {
    let [rows, cols] = x.dims();
    let x = if rows > cols { x.transpose() } else { x };
    let norm = x.clone().square().sum().sqrt().reshape([1, 1]);
    let mut x = x / (norm + 1e-7);
    let [a, b, c] = QUINTIC;
    for _ in 0..ROUNDS {
        let square = x.clone().matmul(x.clone().transpose());
        let step = square.clone() * b + square.clone().matmul(square) * c;
        x = x.clone() * a + step.matmul(x);
    }
    if rows > cols { x.transpose() } else { x }
}
