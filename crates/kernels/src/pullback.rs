use burn::tensor::{Gradients, Tensor};

/// A value that a gradient is wanted for: a leaf of burn's autodiff graph.
pub trait Tracked {
    /// The same values as a leaf that retains its gradient.
    #[must_use]
    fn tracked(self) -> Self;
}

impl<const D: usize> Tracked for Tensor<D> {
    fn tracked(self) -> Self {
        self.autodiff().require_grad()
    }
}

/// The vector-Jacobian product of whatever graph ends in `output`: carries `gradient`, the
/// gradient of the loss at `output`, back to the graph's leaves.
///
/// burn's `backward` starts from a scalar with gradient one; the inner product of `output` with
/// a constant has exactly `gradient` as its own.
pub fn pull_back<const D: usize>(output: &Tensor<D>, gradient: Tensor<D>) -> Gradients {
    (output.clone() * gradient.autodiff()).sum().backward()
}
