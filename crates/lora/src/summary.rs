//! What an adapter is made of, module by module.

use burn::tensor::Tensor;

use crate::tensors::numbers;
use crate::{Adapter, LoraError};

/// One adapted module.
#[derive(Debug, Clone, PartialEq)]
pub struct ModuleSummary {
    /// Its name.
    pub name: String,
    /// Rank of its update.
    pub rank: usize,
    /// The factor in front of `B A`.
    pub scale: f64,
    /// Numbers that were trained.
    pub parameters: usize,
    /// Frobenius norm of `scale * B A`.
    pub norm: f64,
    /// Whether all its numbers are finite.
    pub finite: bool,
}

impl Adapter {
    /// Every module, in the order of their names.
    pub fn summary(&self) -> Result<Vec<ModuleSummary>, LoraError> {
        let of = |(name, pair): (&String, &crate::LoraPair)| {
            let squares = |tensor: &Tensor<2>| tensor.clone().square().sum();
            let tensors: Vec<&Tensor<2>> = pair.tensors().map(|(_, tensor)| tensor).collect();
            let total = Tensor::cat(tensors.iter().map(|tensor| squares(tensor)).collect(), 0).sum();
            // |B A|^2 is the sum of the products of two Gram matrices, which are small.
            let of_a = pair.a.clone().matmul(pair.a.clone().transpose());
            let of_b = pair.b.clone().transpose().matmul(pair.b.clone());
            let square = number(name, &(of_a * of_b).sum())?;
            Ok(ModuleSummary {
                name: name.clone(),
                rank: pair.rank(),
                scale: pair.scale,
                parameters: tensors.iter().map(|tensor| tensor.shape().num_elements()).sum(),
                norm: pair.scale.abs() * square.max(0.0).sqrt(),
                finite: number(name, &total)?.is_finite() && square.is_finite(),
            })
        };
        self.pairs.iter().map(of).collect()
    }
}

fn number(name: &str, tensor: &Tensor<1>) -> Result<f64, LoraError> {
    Ok(numbers(name, tensor)?.first().copied().map_or(f64::NAN, f64::from))
}
