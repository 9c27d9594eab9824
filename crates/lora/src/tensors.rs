//! The tensors that training changes, by name: what has a gradient, an optimizer's state, a place in
//! a file.

use std::fmt;

use burn::tensor::Tensor;

use crate::{Adapter, LoraPair};

/// Which of an adapted module's tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Factor {
    /// `[rank, in]`
    A,
    /// `[out, rank]`
    B,
    /// `DoRA`'s, `[1, out]`
    Magnitude,
}

impl Factor {
    /// PEFT's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::A => "lora_A",
            Self::B => "lora_B",
            Self::Magnitude => "lora_magnitude_vector",
        }
    }
}

impl fmt::Display for Factor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A tensor that training changes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TensorName {
    /// The adapted module's name.
    pub module: String,
    /// Which of its tensors.
    pub factor: Factor,
}

impl TensorName {
    /// The tensor `factor` of `module`.
    pub fn new(module: impl Into<String>, factor: Factor) -> Self {
        Self { module: module.into(), factor }
    }
}

/// `model.layers.0.self_attn.q_proj.lora_A`
impl fmt::Display for TensorName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.module, self.factor)
    }
}

impl LoraPair {
    /// Its tensors, in their order.
    pub fn tensors(&self) -> impl Iterator<Item = (Factor, &Tensor<2>)> {
        let magnitude = self.magnitude.iter().map(|magnitude| (Factor::Magnitude, magnitude));
        [(Factor::A, &self.a), (Factor::B, &self.b)].into_iter().chain(magnitude)
    }

    /// The same, to be changed.
    pub fn tensors_mut(&mut self) -> impl Iterator<Item = (Factor, &mut Tensor<2>)> {
        let magnitude = self.magnitude.iter_mut().map(|magnitude| (Factor::Magnitude, magnitude));
        [(Factor::A, &mut self.a), (Factor::B, &mut self.b)].into_iter().chain(magnitude)
    }
}

impl Adapter {
    /// Every tensor of every module, in the order of their names.
    pub fn tensors(&self) -> impl Iterator<Item = (TensorName, &Tensor<2>)> {
        self.pairs.iter().flat_map(|(module, pair)| {
            pair.tensors().map(|(factor, tensor)| (TensorName::new(module.clone(), factor), tensor))
        })
    }

    /// The same, to be changed.
    pub fn tensors_mut(&mut self) -> impl Iterator<Item = (TensorName, &mut Tensor<2>)> {
        self.pairs.iter_mut().flat_map(|(module, pair)| {
            pair.tensors_mut().map(|(factor, tensor)| (TensorName::new(module.clone(), factor), tensor))
        })
    }
}
