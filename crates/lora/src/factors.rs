//! Two factors that come as near to a matrix as their rank allows.

use burn::linalg::svd;
use burn::tensor::{Tensor, TensorData};
use pronk_kernels::{dot, stream};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Directions looked at beyond the rank: Halko et al. 2011 advise 5 to 10.
const OVERSAMPLING: usize = 10;
/// Rows or columns up to which all singular values are found.
const SMALL: usize = 64;
/// What is left of a vector, of its length before, where it lies in the span of those before it.
const NOTHING: f32 = 1e-6;
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
/// matrix is small. They turn the directions `turns` times towards the largest singular values: 1 to 4 times is
/// Halko's advice. `seed` and `name` alone decide the directions. The numbers have to be finite.
pub fn low_rank_factors(
    matrix: &Tensor<2>,
    rank: usize,
    turns: usize,
    seed: u64,
    name: &str,
) -> LowRankFactors {
    let [rows, cols] = matrix.dims();
    let rank = rank.min(rows).min(cols);
    let width = rank + OVERSAMPLING;
    let (u, s, vt) = if rows.min(cols) <= SMALL.max(2 * width) {
        svd::<2, 1>(matrix.clone(), SWEEPS)
    } else {
        let start = directions([width, cols], seed, name, matrix);
        let basis = largest_directions(matrix, start, turns, |across| across);
        let within = basis.clone().matmul(matrix.clone());
        let across = orthonormal(&within);
        // Square and small: width by width.
        let (u, s, vt) = svd::<2, 1>(within.matmul(across.clone().transpose()), SWEEPS);
        (basis.transpose().matmul(u), s, vt.matmul(across))
    };
    let s = s.narrow(0, 0, rank);
    let root = s.clone().sqrt();
    LowRankFactors {
        a: vt.narrow(0, 0, rank) * root.clone().unsqueeze_dim(1),
        b: u.narrow(1, 0, rank) * root.unsqueeze_dim(0),
        energy: s.square().sum(),
    }
}

/// The factors of `matrix`, `[rows, cols]`, with which `(matrix - B A) X^T` is smallest, where `inputs` is `X^T X`,
/// `[cols, cols]`: what is multiplied with X hardly changes if `B A` stands for the matrix (QERA, Zhang et al. 2024,
/// <https://arxiv.org/abs/2410.06040>). The columns of B are the largest left singular vectors of `matrix X^T`, and
/// `B A` is the matrix projected onto them; then both are shared out evenly. `energy` is the squared norm of `B A X^T`.
/// All else as for [`low_rank_factors`].
pub fn low_rank_factors_over(
    matrix: &Tensor<2>,
    inputs: &Tensor<2>,
    rank: usize,
    turns: usize,
    seed: u64,
    name: &str,
) -> LowRankFactors {
    let [rows, cols] = matrix.dims();
    let rank = rank.min(rows).min(cols);
    let width = rank + OVERSAMPLING;
    let basis = if rows <= SMALL.max(2 * width) {
        Tensor::eye(rows, &matrix.device())
    } else {
        let start = directions([width, cols], seed, name, matrix);
        largest_directions(matrix, start, turns, |across| across.matmul(inputs.clone()))
    };
    let within = basis.clone().matmul(matrix.clone());
    let squares = within.clone().matmul(inputs.clone()).matmul(within.clone().transpose());
    let (u, s, _) = svd::<2, 1>(squares, SWEEPS);
    let u = u.narrow(1, 0, rank);
    let (a, b) = (u.clone().transpose().matmul(within), basis.transpose().matmul(u));
    // B is orthonormal so far. A row of zeros stays one.
    let root = a.clone().square().sum_dim(1).sqrt().sqrt();
    LowRankFactors {
        a: a / root.clone().clamp_min(f32::MIN_POSITIVE),
        b: b * root.transpose(),
        energy: s.narrow(0, 0, rank).sum(),
    }
}

/// An orthonormal basis, in rows so that its vectors lie in one piece, of about the largest left singular vectors
/// of `matrix X^T`, where `weighed` multiplies with `X^T X`.
fn largest_directions(
    matrix: &Tensor<2>,
    start: Tensor<2>,
    turns: usize,
    weighed: impl Fn(Tensor<2>) -> Tensor<2>,
) -> Tensor<2> {
    let mut basis = orthonormal(&start.matmul(matrix.clone().transpose()));
    for _ in 0..turns {
        let across = orthonormal(&weighed(basis.matmul(matrix.clone())));
        basis = orthonormal(&across.matmul(matrix.clone().transpose()));
    }
    basis
}

/// An orthonormal basis of what the rows of `x` span, with zeros for those that lie in the span of the ones before.
/// Gram's and Schmidt's way, twice, which is as good as others (Giraud et al. 2005).
fn orthonormal(x: &Tensor<2>) -> Tensor<2> {
    let [count, length] = x.dims();
    // A device that fails is told of where its numbers are read next.
    let Ok(mut rows) = x.try_to_vec_as::<f32>() else { return x.clone() };
    for at in 0..count {
        let (before, rest) = rows.split_at_mut(at * length);
        let Some((row, _)) = rest.split_at_mut_checked(length) else { break };
        let whole = norm(row);
        for _ in 0..2 {
            for other in before.chunks_exact(length) {
                let along = dot(row, other);
                for (x, other) in row.iter_mut().zip(other) {
                    *x -= along * other;
                }
            }
        }
        let left = norm(row);
        let factor = if left > NOTHING * whole { 1.0 / left } else { 0.0 };
        for x in row {
            *x *= factor;
        }
    }
    Tensor::from_data(TensorData::new(rows, [count, length]), &x.device())
}

fn norm(x: &[f32]) -> f32 {
    dot(x, x).sqrt()
}

/// Numbers from -1 to 1: what their distribution is matters little.
fn directions(shape: [usize; 2], seed: u64, name: &str, like: &Tensor<2>) -> Tensor<2> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream(&name));
    let numbers: Vec<f32> = (0..shape[0] * shape[1]).map(|_| rng.random_range(-1.0..1.0)).collect();
    Tensor::from_data(TensorData::new(numbers, shape), &like.device())
}
