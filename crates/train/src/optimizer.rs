use std::collections::BTreeMap;

use burn::tensor::{Tensor, TensorData};
use pronk_kernels::{AdamW, AdamWState, Blockwise, Lion, Muon};
use pronk_lora::{Adapter, LoraPair};
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
}

/// What an optimizer remembers of one factor.
#[derive(Debug, Clone)]
pub(crate) enum FactorState {
    Moments(AdamWState),
    /// First and second moment.
    EightBit {
        m: Blockwise,
        v: Blockwise,
    },
    /// Lion's and Muon's.
    Momentum(Tensor<2>),
}

impl FactorState {
    fn new(kind: OptimizerKind, factor: &Tensor<2>) -> Self {
        let zeros = |signed| Blockwise::zeros(factor.shape().num_elements(), signed);
        match kind {
            OptimizerKind::AdamW => Self::Moments(AdamWState::zeros_like(factor)),
            OptimizerKind::AdamW8bit => Self::EightBit { m: zeros(true), v: zeros(false) },
            OptimizerKind::Lion | OptimizerKind::Muon => Self::Momentum(factor.zeros_like()),
        }
    }
}

/// An optimizer over a whole adapter.
#[derive(Debug, Clone)]
pub struct Optimizer {
    kind: OptimizerKind,
    weight_decay: f64,
    lora_plus_ratio: f64,
    /// Of A and of B, by module name.
    pub(crate) states: BTreeMap<String, (FactorState, FactorState)>,
}

impl Optimizer {
    /// With everything it remembers at zero.
    pub fn new(config: &TrainConfig, adapter: &Adapter) -> Self {
        let TrainConfig { optimizer: kind, weight_decay, lora_plus_ratio, .. } = *config;
        let zero = |p: &LoraPair| (FactorState::new(kind, &p.a), FactorState::new(kind, &p.b));
        let states = adapter.pairs.iter().map(|(name, pair)| (name.clone(), zero(pair))).collect();
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
        let (kind, decay) = (self.kind, self.weight_decay);
        let rate_of_b = learning_rate * self.lora_plus_ratio;
        for (name, pair) in &mut adapter.pairs {
            let (Some(gradient), Some((a, b))) = (gradients.pairs.get(name), self.states.get_mut(name))
            else {
                continue;
            };
            pair.a = stepped(kind, decay, pair.a.clone(), gradient.a.clone(), a, learning_rate, step)?;
            pair.b = stepped(kind, decay, pair.b.clone(), gradient.b.clone(), b, rate_of_b, step)?;
        }
        Ok(())
    }
}

/// One factor after a step.
fn stepped(
    kind: OptimizerKind,
    weight_decay: f64,
    factor: Tensor<2>,
    gradient: Tensor<2>,
    state: &mut FactorState,
    learning_rate: f64,
    step: u64,
) -> Result<Tensor<2>, TrainError> {
    let adamw = AdamW { weight_decay, ..AdamW::default() };
    Ok(match state {
        FactorState::Moments(state) => adamw.step(factor, gradient, state, learning_rate, step),
        FactorState::EightBit { m, v } => {
            let on_device = |moment: &Blockwise| {
                Tensor::from_data(TensorData::new(moment.dequantize(), factor.dims()), &factor.device())
            };
            let mut state = AdamWState { m: on_device(m), v: on_device(v) };
            let factor = adamw.step(factor, gradient, &mut state, learning_rate, step);
            (*m, *v) = (
                Blockwise::quantize(&numbers(&state.m)?, true),
                Blockwise::quantize(&numbers(&state.v)?, false),
            );
            factor
        }
        FactorState::Momentum(momentum) if kind == OptimizerKind::Muon => {
            Muon { weight_decay, ..Muon::default() }.step(factor, gradient, momentum, learning_rate)
        }
        FactorState::Momentum(momentum) => {
            Lion { weight_decay, ..Lion::default() }.step(factor, gradient, momentum, learning_rate)
        }
    })
}

/// A tensor's numbers, read back from its device.
pub(crate) fn numbers(tensor: &Tensor<2>) -> Result<Vec<f32>, TrainError> {
    tensor.try_to_vec_as::<f32>().map_err(|e| TrainError::Device(e.to_string()))
}

#[cfg(all(test, any(feature = "flex", feature = "tch")))]
mod tests {
    use pronk_kernels::open_device;
    use pronk_lora::LoraConfig;

    use super::*;

    /// A factor, or a gradient, that depends on `seed`.
    fn wave(shape: [usize; 2], seed: usize) -> Tensor<2> {
        let device = open_device("auto").unwrap();
        let values = (0..shape[0] * shape[1]).map(|i| ((i * 7 + seed * 13) as f32 * 0.7).sin());
        Tensor::from_data(TensorData::new(values.collect::<Vec<f32>>(), shape), &device)
    }

    fn pair(seed: usize) -> LoraPair {
        LoraPair { a: wave([4, 80], seed), b: wave([90, 4], seed + 1) }
    }

    /// A and B after some steps.
    fn trained(config: &TrainConfig, learning_rate: f64) -> [Vec<f32>; 2] {
        let pairs = [("m".to_owned(), pair(0))].into();
        let mut adapter = Adapter { config: LoraConfig::default(), pairs };
        let mut optimizer = Optimizer::new(config, &adapter);
        for step in 1..=10 {
            let gradients = Gradients { pairs: [("m".to_owned(), pair(step as usize))].into() };
            optimizer.step(&mut adapter, &gradients, learning_rate, step).unwrap();
        }
        let LoraPair { a, b } = &adapter.pairs["m"];
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
