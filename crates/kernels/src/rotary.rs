// Loops have to end up inside the functions of `wide` that are compiled for wider vectors.
#![allow(clippy::inline_always)]

#[cfg(feature = "cube")]
mod card;
mod turn;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind, unary};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::{Device, Tensor, TensorData};

use self::turn::turn;
use crate::direction::Direction;
use crate::host::{Host, has_loops};
use crate::plain;

/// How rotary frequencies are stretched beyond the context a base was trained with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Positions count as they are.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// How many times longer the context becomes.
        factor: f64,
    },
    /// Llama 3's: long wavelengths divided by `factor`, short ones kept, a smooth change between.
    Llama3 {
        /// How many times longer the context becomes.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are stretched whole.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` stay as they are.
        high_freq_factor: f64,
        /// Tokens of context the base was first trained with.
        original_context: f64,
    },
}

impl RopeScaling {
    /// What each frequency is divided by, as llama.cpp stores it in `rope_freqs.weight`.
    pub fn factors(self, head_dim: usize, theta: f64) -> Vec<f64> {
        frequencies(head_dim, theta).map(|f| f / self.scale(f)).collect()
    }

    /// One frequency, scaled. The formulas are those of Hugging Face's `modeling_rope_utils`.
    fn scale(self, frequency: f64) -> f64 {
        match self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let turns = original_context * frequency / std::f64::consts::TAU;
                if turns < low_freq_factor {
                    frequency / factor
                } else if turns > high_freq_factor {
                    frequency
                } else {
                    let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }
}

/// `theta^(-2 i / head_dim)`, in radians a token.
fn frequencies(head_dim: usize, theta: f64) -> impl Iterator<Item = f64> {
    (0..head_dim / 2).map(move |i| theta.powf(-2.0 * i as f64 / head_dim as f64))
}

/// Rotary position embedding (Su et al. 2021, <https://arxiv.org/abs/2104.09864>), in the layout
/// of Hugging Face checkpoints: feature `i` turns together with feature `i + head_dim / 2`.
#[derive(Debug, Clone)]
pub struct Rotary {
    frequencies: Vec<f32>,
}

/// Cosines and sines of one batch's positions, each `[tokens, 1, head_dim / 2]`.
#[derive(Debug, Clone)]
pub struct RotaryTables {
    pub(crate) cos: Tensor<3>,
    pub(crate) sin: Tensor<3>,
}

impl Rotary {
    /// Frequencies for heads of `head_dim` features over the base `theta`.
    pub fn new(head_dim: usize, theta: f64, scaling: RopeScaling) -> Self {
        Self { frequencies: frequencies(head_dim, theta).map(|f| scaling.scale(f) as f32).collect() }
    }

    /// The tables for tokens at `positions` within their records.
    pub fn tables(&self, positions: &[u32], device: &Device) -> RotaryTables {
        let shape = [positions.len(), 1, self.frequencies.len()];
        // The angle is rounded to float32, as the reference does; its cosine is taken exactly.
        let angles: Vec<f64> = positions
            .iter()
            .flat_map(|&p| self.frequencies.iter().map(move |&f| f64::from(p as f32 * f)))
            .collect();
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|&a| f(a) as f32).collect();
            Tensor::from_data(TensorData::new(values, shape), device)
        };
        RotaryTables { cos: table(f64::cos), sin: table(f64::sin) }
    }
}

impl RotaryTables {
    /// Turns every head of `x` by its token's position.
    ///
    /// # Shapes
    /// - x and result: `[tokens, heads, head_dim]`
    ///
    /// # Panics
    /// Where `x` has another number of tokens than the tables, or heads of another width.
    pub fn apply(&self, x: Tensor<3>) -> Tensor<3> {
        if !has_loops(&x) {
            return plain::rotary(x, self);
        }
        let (cos, sin) = (self.cos.clone().into_dispatch(), self.sin.clone().into_dispatch());
        Tensor::from_dispatch(Dispatch::turn(x.into_dispatch(), cos, sin, Direction::Forward))
    }
}

/// The operation, for backends with loops of our own.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    LibTorch: cfg(feature = "tch"),
    Cube: cfg(feature = "cube"),
    Autodiff,
)]
pub trait RotaryTurn: Backend {
    /// See [`RotaryTables::apply`].
    fn turn(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        direction: Direction,
    ) -> FloatTensor<Self>;
}

impl<B: Host> RotaryTurn for B {
    fn turn(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        direction: Direction,
    ) -> FloatTensor<Self> {
        let (shape, cos, sin) = (x.shape(), B::contiguous(cos), B::contiguous(sin));
        assert_eq!(cos.shape()[2] * 2, shape[2], "an angle for every pair of features");
        let widths = [shape[1], shape[2] / 2];
        B::rewrite(x, |x| turn(x, [B::numbers(&cos), B::numbers(&sin)], widths, direction)).0
    }
}

impl<B: RotaryTurn, C: CheckpointStrategy> RotaryTurn for Autodiff<B, C> {
    fn turn(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        direction: Direction,
    ) -> FloatTensor<Self> {
        let operation = Recorded.prepare::<C>([x.node()]).compute_bound().stateful();
        let (cos, sin) = (cos.into_primitive(), sin.into_primitive());
        let y = B::turn(x.into_primitive(), cos.clone(), sin.clone(), direction);
        match operation {
            OpsKind::Tracked(prep) => prep.finish((cos, sin, direction), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}

/// The turn in an autodiff graph.
#[derive(Debug)]
struct Recorded;

impl<B: RotaryTurn> Backward<B, 1> for Recorded {
    /// Cosines, sines, and which way.
    type State = (FloatTensor<B>, FloatTensor<B>, Direction);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (cos, sin, direction) = ops.state;
        unary::<B, _>(ops.parents, ops.node, grads, |dy| B::turn(dy, cos, sin, direction.reversed()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_keeps_short_waves_and_stretches_long_ones() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192.0,
        };
        assert!((scaling.scale(1.0) - 1.0).abs() < 1e-12);
        assert!((scaling.scale(1e-6) - 1e-6 / 8.0).abs() < 1e-18);
        let between = scaling.scale(2.0 * std::f64::consts::TAU / 8192.0);
        let plain = 2.0 * std::f64::consts::TAU / 8192.0;
        assert!(between < plain && between > plain / 8.0);
    }
}
