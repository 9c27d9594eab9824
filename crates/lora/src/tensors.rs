//! The tensors that training changes, by name: what has a gradient, an optimizer's state, a place in
//! a file.

use std::fmt;

use burn::tensor::Tensor;

use crate::{Adapter, LoraError, LoraPair};

/// Which of an adapted module's tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TensorKind {
    /// `[rank, in]`
    A,
    /// `[out, rank]`
    B,
    /// `DoRA`'s, `[1, out]`
    Magnitude,
    /// The whole weight, `[out, in]`, in the place of the base's.
    Weight,
    /// The bias, `[1, out]`, in the place of the base's.
    Bias,
}

impl TensorKind {
    /// PEFT's name for it, and of what the base has too the checkpoint's.
    pub fn name(self) -> &'static str {
        match self {
            Self::A => "lora_A",
            Self::B => "lora_B",
            Self::Magnitude => "lora_magnitude_vector",
            Self::Weight => "weight",
            Self::Bias => "bias",
        }
    }

    /// The shape in which files hold it: what is one row is a vector there.
    pub fn shape_in_file(self, [rows, columns]: [usize; 2]) -> Vec<usize> {
        if matches!(self, Self::Magnitude | Self::Bias) { vec![columns] } else { vec![rows, columns] }
    }
}

impl fmt::Display for TensorKind {
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
    pub kind: TensorKind,
}

impl TensorName {
    /// The tensor `kind` of `module`.
    pub fn new(module: impl Into<String>, kind: TensorKind) -> Self {
        Self { module: module.into(), kind }
    }

    /// The base's own tensor that a checkpoint calls `name`: a weight or a bias.
    pub fn of_base(name: &str) -> Option<Self> {
        let (module, kind) = name.rsplit_once('.')?;
        let kind = [TensorKind::Weight, TensorKind::Bias].into_iter().find(|own| own.name() == kind)?;
        Some(Self::new(module, kind))
    }
}

/// `model.layers.0.self_attn.q_proj.lora_A`
impl fmt::Display for TensorName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.module, self.kind)
    }
}

/// The numbers of a tensor, which is called `name` where its device has failed.
pub(crate) fn numbers<const D: usize>(
    name: impl fmt::Display,
    tensor: &Tensor<D>,
) -> Result<Vec<f32>, LoraError> {
    tensor.try_to_vec_as().map_err(|e| LoraError::Malformed {
        path: name.to_string().into(),
        problem: format!("cannot be read from the device ({e})"),
    })
}

impl LoraPair {
    /// Its tensors, in their order.
    pub fn tensors(&self) -> impl Iterator<Item = (TensorKind, &Tensor<2>)> {
        let magnitude = self.magnitude.iter().map(|magnitude| (TensorKind::Magnitude, magnitude));
        [(TensorKind::A, &self.a), (TensorKind::B, &self.b)].into_iter().chain(magnitude)
    }

    /// The same, to be changed.
    pub fn tensors_mut(&mut self) -> impl Iterator<Item = (TensorKind, &mut Tensor<2>)> {
        let magnitude = self.magnitude.iter_mut().map(|magnitude| (TensorKind::Magnitude, magnitude));
        [(TensorKind::A, &mut self.a), (TensorKind::B, &mut self.b)].into_iter().chain(magnitude)
    }
}

impl Adapter {
    /// Every tensor that is trained: those of the pairs in the order of their modules' names, then what
    /// takes the place of the base's own.
    pub fn tensors(&self) -> impl Iterator<Item = (TensorName, &Tensor<2>)> {
        let pairs = self.pairs.iter().flat_map(|(module, pair)| {
            pair.tensors().map(|(kind, tensor)| (TensorName::new(module.clone(), kind), tensor))
        });
        pairs.chain(self.whole.iter().map(|(name, tensor)| (name.clone(), tensor)))
    }

    /// The same, to be changed.
    pub fn tensors_mut(&mut self) -> impl Iterator<Item = (TensorName, &mut Tensor<2>)> {
        let pairs = self.pairs.iter_mut().flat_map(|(module, pair)| {
            pair.tensors_mut().map(|(kind, tensor)| (TensorName::new(module.clone(), kind), tensor))
        });
        pairs.chain(self.whole.iter_mut().map(|(name, tensor)| (name.clone(), tensor)))
    }
}
