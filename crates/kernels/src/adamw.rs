//! Every number of a parameter and of its moments is read and written once, by all cores; on a device that does not lend
//! them it is a dozen of its operations.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::frozen::wide::widest;
use crate::host::{Host, lends};
use crate::plain;
use crate::rewritten::Rewritten;

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
        let factors = Factors::new(self, learning_rate, step);
        let AdamWState { m, v } = &*state;
        if ![&parameter, &gradient, m, v].into_iter().all(lends) {
            return plain::adamw(parameter, gradient, state, factors);
        }
        // Given away, so that nobody else holds them: they are written where they are.
        let empty = || Tensor::empty([0, 0], &parameter.device());
        let [m, v] = [&mut state.m, &mut state.v].map(|moment| std::mem::replace(moment, empty()));
        let [p, g, m, v] = [parameter, gradient, m, v].map(Tensor::into_dispatch);
        let (p, m, v) = Dispatch::adamw(p, g, m, v, factors);
        let [p, m, v] = [p, m, v].map(Tensor::from_dispatch);
        *state = AdamWState { m, v };
        p
    }
}

/// What the numbers of one step are multiplied by.
#[derive(Debug, Clone, Copy)]
pub struct Factors {
    pub(crate) betas: [f64; 2],
    /// Of the second moment.
    pub(crate) correction: f64,
    pub(crate) eps: f64,
    /// With the correction of the first moment.
    pub(crate) learning_rate: f64,
    /// Share of a weight that its decay leaves.
    pub(crate) kept: f64,
}

impl Factors {
    fn new(adamw: &AdamW, learning_rate: f64, step: u64) -> Self {
        let AdamW { beta1, beta2, eps, weight_decay } = *adamw;
        let [first, correction] = [beta1, beta2].map(|beta| 1.0 - beta.powf(step as f64));
        let kept = 1.0 - learning_rate * weight_decay;
        Self { betas: [beta1, beta2], correction, eps, learning_rate: learning_rate / first, kept }
    }

    /// The step, number by number.
    fn rewrite(self, [p, m, v]: [Rewritten; 3], g: &[f32]) {
        const TASK: usize = 8 << 10;
        let [beta1, beta2] = self.betas.map(|beta| beta as f32);
        let [new1, new2] = self.betas.map(|beta| (1.0 - beta) as f32);
        let [correction, eps, learning_rate, kept] =
            [self.correction, self.eps, self.learning_rate, self.kept].map(|x| x as f32);
        let tasks = p.pieces(TASK).zip(m.pieces(TASK)).zip(v.pieces(TASK)).zip(g.par_chunks(TASK));
        tasks.for_each(|(((p, m), v), g)| {
            widest!(|| {
                for (((p, m), v), g) in p.iter_mut().zip(m.iter_mut()).zip(v.iter_mut()).zip(g) {
                    *m = *m * beta1 + g * new1;
                    *v = *v * beta2 + g * g * new2;
                    let denominator = (*v / correction).sqrt() + eps;
                    *p = *p * kept - *m / denominator * learning_rate;
                }
            });
        });
    }
}

/// The operation, for backends that lend their numbers.
#[backend_extension(Flex: cfg(feature = "flex"), LibTorch: cfg(feature = "tch"))]
pub trait AdamWStep: Backend {
    /// The parameter and its moments after a step.
    fn adamw(
        parameter: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        factors: Factors,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
}

impl<B: Host> AdamWStep for B {
    fn adamw(
        parameter: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        m: FloatTensor<Self>,
        v: FloatTensor<Self>,
        factors: Factors,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let gradient = B::contiguous(gradient);
        let (p, (m, (v, ()))) = B::rewrite(parameter, |p| {
            B::rewrite(m, |m| B::rewrite(v, |v| factors.rewrite([p, m, v], B::numbers(&gradient))))
        });
        (p, m, v)
    }
}
