use std::collections::BTreeMap;

use burn::tensor::{Tensor, TensorData};
use pronk_kernels::{AdamW, AdamWState, Blockwise, Lion, Muon};
use pronk_lora::{Adapter, TensorKind, TensorName};
use serde::{Deserialize, Serialize};

use crate::{Gradients, TrainConfig, TrainError};

/// `train.optimizer`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// `AdamW`, with two moments in float32.
    #[default]
    AdamW,
    /// The same with its moments in 8 bits, in the host's memory.
    AdamW8bit,
    /// Lion: the sign of one moment.
    Lion,
    /// Muon: one moment, made orthogonal.
    Muon,
}

impl OptimizerKind {
    /// Bytes that it remembers of a number, rounded up.
    pub fn state_bytes(self) -> u64 {
        match self {
            Self::AdamW => 8,
            Self::AdamW8bit => 3,
            Self::Lion | Self::Muon => 4,
        }
    }

    /// Copies of a tensor that its step makes on the way: of moments in 8 bits, what they stand for too.
    pub(crate) fn step_copies(self) -> u64 {
        if self == Self::AdamW8bit { 7 } else { 3 }
    }
}

/// What an optimizer remembers of one tensor.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // three a module: a few hundred in all
pub(crate) enum TensorState {
    Moments(AdamWState),
    /// First and second moment.
    EightBit {
        m: Blockwise,
        v: Blockwise,
    },
    /// Lion's and Muon's.
    Momentum(Tensor<2>),
}

impl TensorState {
    fn new(kind: OptimizerKind, name: &TensorName, tensor: &Tensor<2>) -> Self {
        let zeros = |signed| Blockwise::zeros(tensor.shape().num_elements(), signed);
        match kind {
            // Muon is for matrices that multiply: embeddings, heads and vectors are left to AdamW, as its author has it.
            OptimizerKind::Muon if matches!(name.kind, TensorKind::Weight | TensorKind::Bias) => {
                Self::Moments(AdamWState::zeros_like(tensor))
            }
            OptimizerKind::AdamW => Self::Moments(AdamWState::zeros_like(tensor)),
            OptimizerKind::AdamW8bit => Self::EightBit { m: zeros(true), v: zeros(false) },
            OptimizerKind::Lion | OptimizerKind::Muon => Self::Momentum(tensor.zeros_like()),
        }
    }
}

/// An optimizer over a whole adapter.
#[derive(Debug, Clone)]
pub struct Optimizer {
    kind: OptimizerKind,
    weight_decay: f64,
    lora_plus_ratio: f64,
    /// Of every tensor that is trained.
    pub(crate) states: BTreeMap<TensorName, TensorState>,
}

impl Optimizer {
    /// With everything it remembers at zero.
    pub fn new(config: &TrainConfig, adapter: &Adapter) -> Self {
        let TrainConfig { optimizer: kind, weight_decay, lora_plus_ratio, .. } = *config;
        let state = |(name, tensor)| {
            let state = TensorState::new(kind, &name, tensor);
            (name, state)
        };
        let states = adapter.tensors().map(state).collect();
        Self { kind, weight_decay, lora_plus_ratio, states }
    }

    /// Optimizer step number `step`, counted from one. B learns faster than A by the ratio of `LoRA+`
    /// (Hayou et al. 2024, <https://arxiv.org/abs/2402.12354>).
    pub fn step(
        &mut self,
        adapter: &mut Adapter,
        gradients: &Gradients,
        learning_rate: f64,
        step: u64,
    ) -> Result<(), TrainError> {
        for (name, tensor) in adapter.tensors_mut() {
            let (Some(gradient), Some(state)) = (gradients.tensors.get(&name), self.states.get_mut(&name))
            else {
                continue;
            };
            let rate = match name.kind {
                TensorKind::B => learning_rate * self.lora_plus_ratio,
                _ => learning_rate,
            };
            // As transformers' Trainer has it, biases do not decay.
            let decay = if name.kind == TensorKind::Bias { 0.0 } else { self.weight_decay };
            let kind = self.kind;
            *tensor = stepped(kind, decay, tensor.clone(), gradient.clone(), state, rate, step)?;
        }
        Ok(())
    }
}

/// One tensor after a step.
fn stepped(
    kind: OptimizerKind,
    weight_decay: f64,
    tensor: Tensor<2>,
    gradient: Tensor<2>,
    state: &mut TensorState,
    learning_rate: f64,
    step: u64,
) -> Result<Tensor<2>, TrainError> {
    let adamw = AdamW { weight_decay, ..AdamW::default() };
    Ok(match state {
        TensorState::Moments(state) => adamw.step(tensor, gradient, state, learning_rate, step),
        TensorState::EightBit { m, v } => {
            let on_device = |moment: &Blockwise| {
                Tensor::from_data(TensorData::new(moment.dequantize(), tensor.dims()), &tensor.device())
            };
            let mut state = AdamWState { m: on_device(m), v: on_device(v) };
            let tensor = adamw.step(tensor, gradient, &mut state, learning_rate, step);
            (*m, *v) = (
                Blockwise::quantize(&numbers(&state.m)?, true),
                Blockwise::quantize(&numbers(&state.v)?, false),
            );
            tensor
        }
        TensorState::Momentum(momentum) if kind == OptimizerKind::Muon => {
            Muon { weight_decay, ..Muon::default() }.step(tensor, &gradient, momentum, learning_rate)
        }
        TensorState::Momentum(momentum) => {
            Lion { weight_decay, ..Lion::default() }.step(tensor, gradient, momentum, learning_rate)
        }
    })
}

/// A tensor's numbers, read back from its device.
pub(crate) fn numbers(tensor: &Tensor<2>) -> Result<Vec<f32>, TrainError> {
    tensor.try_to_vec_as::<f32>().map_err(|e| TrainError::Device(e.to_string()))
}

#[cfg(all(test, any(feature = "flex", feature = "tch")))]
#[allow(clippy::unwrap_used)] // a test reports by panicking
mod tests {
    use pronk_kernels::open_device;
    use pronk_lora::{LoraConfig, LoraPair};

    use super::*;

    /// A tensor, or a gradient, that depends on `seed`.
    fn wave(shape: [usize; 2], seed: usize) -> Tensor<2> {
        let device = open_device("auto").unwrap();
        let values = (0..shape[0] * shape[1]).map(|i| ((i * 7 + seed * 13) as f32 * 0.7).sin());
        Tensor::from_data(TensorData::new(values.collect::<Vec<f32>>(), shape), &device)
    }

    fn pair(seed: usize) -> LoraPair {
        LoraPair {
            a: wave([4, 80], seed),
            b: wave([90, 4], seed + 1),
            scale: 1.0,
            magnitude: None,
            fixed: None,
        }
    }

    /// A and B after some steps.
    fn trained(config: &TrainConfig, learning_rate: f64) -> [Vec<f32>; 2] {
        let adapter = |seed| {
            let pairs = [("m".to_owned(), pair(seed))].into();
            Adapter { config: LoraConfig::default(), pairs, whole: BTreeMap::new() }
        };
        let mut adapter_now = adapter(0);
        let mut optimizer = Optimizer::new(config, &adapter_now);
        for step in 1..=10 {
            let gradients = adapter(step as usize);
            let tensors = gradients.tensors().map(|(name, tensor)| (name, tensor.clone())).collect();
            optimizer.step(&mut adapter_now, &Gradients { tensors }, learning_rate, step).unwrap();
        }
        let LoraPair { a, b, .. } = &adapter_now.pairs["m"];
        [numbers(a).unwrap(), numbers(b).unwrap()]
    }

    #[test]
    fn lora_plus_is_another_learning_rate_for_b() {
        for optimizer in [OptimizerKind::AdamW, OptimizerKind::Lion, OptimizerKind::Muon] {
            let plain = TrainConfig { optimizer, ..TrainConfig::default() };
            let plus = TrainConfig { lora_plus_ratio: 16.0, ..plain.clone() };
            let [a, b] = trained(&plus, 1e-3);
            assert_eq!(a, trained(&plain, 1e-3)[0]);
            assert_eq!(b, trained(&plain, 16e-3)[1]);
            assert_ne!(b, trained(&plain, 1e-3)[1]);
        }
    }

    #[test]
    fn eight_bits_step_nearly_as_thirty_two() {
        let config = |optimizer| TrainConfig { optimizer, ..TrainConfig::default() };
        let exact = trained(&config(OptimizerKind::AdamW), 1e-2);
        let eight = trained(&config(OptimizerKind::AdamW8bit), 1e-2);
        let start = [numbers(&pair(0).a).unwrap(), numbers(&pair(0).b).unwrap()];
        for ((exact, eight), start) in exact.iter().zip(&eight).zip(&start) {
            let norm = |x: &[f32], y: &[f32]| {
                x.iter().zip(y).map(|(x, y)| f64::from(x - y).powi(2)).sum::<f64>().sqrt()
            };
            let off = norm(exact, eight) / norm(exact, start);
            assert!(off > 0.0 && off < 0.05, "off by {off} of the way");
        }
    }
}
