//! `DoRA` (Liu et al. 2024, <https://arxiv.org/abs/2402.09353>): the update turns the rows of a weight, a
//! vector of magnitudes says how long they are.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use burn::tensor::Tensor;
use pronk_kernels::FrozenLinear;

use crate::LoraPair;

/// Norms of adapted weights' rows, once computed. They hold as long as the base and the adapter stay
/// what they are: for a micro-batch, or an answer.
#[derive(Debug, Default)]
pub struct WeightNorms(Mutex<BTreeMap<String, Tensor<2>>>);

impl WeightNorms {
    /// Those of the module called `name`, computed where they are not known yet.
    pub(crate) fn of(&self, name: &str, compute: impl FnOnce() -> Tensor<2>) -> Tensor<2> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.entry(name.to_owned()).or_insert_with(compute).clone()
    }
}

/// Norms of the rows of `W + scale * B A`, `[1, out]`, without a gradient, as in the paper (section 4.3).
///
/// Neither `W` nor `B A` is ever dense for it: of a row `i`,
/// `|W_i|^2 + 2 scale B_i (W_i A^T)^T + scale^2 B_i (A A^T) B_i^T`. `squares` are the `|W_i|^2`, `[out]`.
pub fn weight_norms(base: &FrozenLinear, squares: &Tensor<1>, pair: &LoraPair) -> Tensor<2> {
    let (a, b) = (pair.a.clone().inner(), pair.b.clone().inner());
    let products = base.product(a.clone()).transpose(); // W A^T, [out, rank]
    let gram = a.clone().matmul(a.transpose()); // [rank, rank]
    let across = (products * b.clone()).sum_dim(1); // [out, 1]
    let own = (b.clone().matmul(gram) * b).sum_dim(1);
    let squares = squares.clone().unsqueeze_dim::<2>(1);
    let total = squares + across * (2.0 * pair.scale) + own * (pair.scale * pair.scale);
    // Rounding may leave less than nothing of a row that the update cancels.
    total.clamp_min(f32::MIN_POSITIVE).sqrt().transpose()
}
