//! Two factors that come as near to a matrix as their rank allows.

use burn::linalg::svd;
use burn::tensor::{Tensor, TensorData};
use pronk_kernels::stream;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Directions looked at beyond the rank, and how often they are turned towards the largest singular values:
/// Halko et al. 2011 advise 5 to 10 of the ones and 1 to 4 of the others.
const OVERSAMPLING: usize = 10;
const TURNS: usize = 4;
/// LAPACK's bound on the sweeps for a singular value.
const SWEEPS: usize = 30;

/// `B A` near a matrix.
#[derive(Debug, Clone)]
pub struct LowRankFactors {
    /// `[rank, cols]`
    pub a: Tensor<2>,
    /// `[rows, rank]`
    pub b: Tensor<2>,
    /// The squared Frobenius norm of `B A`, which is what it keeps of the matrix's.
    pub energy: Tensor<1>,
}

/// The factors of `matrix`, `[rows, cols]`, by its `rank` largest singular values, shared out between both:
/// `B = U sqrt(S)`, `A = sqrt(S) V^T`. Of rank `min(rows, cols)` at most.
///
/// The singular values are found by a randomized range finder with subspace iterations (Halko, Martinsson
/// and Tropp 2011, <https://arxiv.org/abs/0909.4061>, algorithms 4.4 and 5.1), or exactly, where the
/// matrix is small. `seed` and `name` alone decide its directions. The numbers have to be finite.
pub fn low_rank_factors(matrix: &Tensor<2>, rank: usize, seed: u64, name: &str) -> LowRankFactors {
    let [rows, cols] = matrix.dims();
    let rank = rank.min(rows).min(cols);
    let width = rank + OVERSAMPLING;
    let (u, s, vt) = if 2 * width >= rows.min(cols) {
        svd::<2, 1>(matrix.clone(), SWEEPS)
    } else {
        let mut basis = orthonormal(matrix.clone().matmul(directions([cols, width], seed, name, matrix)));
        for _ in 0..TURNS {
            let across = orthonormal(matrix.clone().transpose().matmul(basis));
            basis = orthonormal(matrix.clone().matmul(across));
        }
        let (u, s, vt) = svd::<2, 1>(basis.clone().transpose().matmul(matrix.clone()), SWEEPS);
        (basis.matmul(u), s, vt)
    };
    let s = s.narrow(0, 0, rank);
    let root = s.clone().sqrt();
    LowRankFactors {
        a: vt.narrow(0, 0, rank) * root.clone().unsqueeze_dim(1),
        b: u.narrow(1, 0, rank) * root.unsqueeze_dim(0),
        energy: s.square().sum(),
    }
}

/// An orthonormal basis of what the columns of `x` span.
fn orthonormal(x: Tensor<2>) -> Tensor<2> {
    svd::<2, 1>(x, SWEEPS).0
}

/// Numbers from -1 to 1: what their distribution is matters little.
fn directions(shape: [usize; 2], seed: u64, name: &str, like: &Tensor<2>) -> Tensor<2> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream(&name));
    let numbers: Vec<f32> = (0..shape[0] * shape[1]).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_data(TensorData::new(numbers, shape), &like.device())
}
