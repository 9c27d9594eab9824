use std::collections::BTreeMap;

use burn::tensor::Tensor;
use pronk_lora::LoraPair;

use crate::TrainError;

/// Gradients of an adapter, by module name.
#[derive(Debug, Clone, Default)]
pub struct Gradients {
    /// Of A and of B, each of its factor's shape.
    pub pairs: BTreeMap<String, LoraPair>,
}

impl Gradients {
    /// Adds those of another micro-batch.
    pub fn accumulate(&mut self, other: Self) {
        for (name, pair) in other.pairs {
            let sum = match self.pairs.remove(&name) {
                None => pair,
                Some(kept) => LoraPair { a: kept.a + pair.a, b: kept.b + pair.b },
            };
            self.pairs.insert(name, sum);
        }
    }

    /// The Euclidean norm over all of them together.
    pub fn norm(&self) -> Result<f64, TrainError> {
        let squares = self.pairs.values().flat_map(|p| [&p.a, &p.b]).map(|t| t.clone().square().sum());
        let squares: Vec<Tensor<1>> = squares.collect();
        if squares.is_empty() {
            return Ok(0.0);
        }
        Ok(scalar(&Tensor::cat(squares, 0).sum())?.sqrt())
    }

    /// Every gradient times `factor`.
    #[must_use]
    pub fn scaled(self, factor: f64) -> Self {
        let scale = |p: LoraPair| LoraPair { a: p.a * factor, b: p.b * factor };
        Self { pairs: self.pairs.into_iter().map(|(name, pair)| (name, scale(pair))).collect() }
    }
}

/// The one number of `tensor`, read back from its device.
pub fn scalar(tensor: &Tensor<1>) -> Result<f64, TrainError> {
    let value: f32 = tensor.clone().try_into_scalar().map_err(|e| TrainError::Device(e.to_string()))?;
    Ok(f64::from(value))
}
