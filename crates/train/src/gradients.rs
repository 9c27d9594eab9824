use std::collections::BTreeMap;

use burn::tensor::Tensor;
use pronk_lora::TensorName;

use crate::TrainError;

/// Gradients of an adapter, by the name of what they are gradients of.
#[derive(Debug, Clone, Default)]
pub struct Gradients {
    /// Each of its tensor's shape.
    pub tensors: BTreeMap<TensorName, Tensor<2>>,
}

impl Gradients {
    /// Adds those of another micro-batch.
    pub fn accumulate(&mut self, other: Self) {
        for (name, gradient) in other.tensors {
            self.add(name, gradient);
        }
    }

    /// Adds one tensor's.
    pub(crate) fn add(&mut self, name: TensorName, gradient: Tensor<2>) {
        let sum = match self.tensors.remove(&name) {
            None => gradient,
            Some(kept) => kept + gradient,
        };
        self.tensors.insert(name, sum);
    }

    /// The Euclidean norm over all of them together.
    pub fn norm(&self) -> Result<f64, TrainError> {
        let squares: Vec<Tensor<1>> = self.tensors.values().map(|t| t.clone().square().sum()).collect();
        if squares.is_empty() {
            return Ok(0.0);
        }
        Ok(scalar(&Tensor::cat(squares, 0).sum())?.sqrt())
    }

    /// Every gradient times `factor`.
    #[must_use]
    pub fn scaled(self, factor: f64) -> Self {
        Self { tensors: self.tensors.into_iter().map(|(name, gradient)| (name, gradient * factor)).collect() }
    }
}

/// The one number of `tensor`, read back from its device.
pub fn scalar(tensor: &Tensor<1>) -> Result<f64, TrainError> {
    let value: f32 = tensor.clone().try_into_scalar().map_err(|e| TrainError::Device(e.to_string()))?;
    Ok(f64::from(value))
}
