//! The gated unit, number by number. Each activation has loops of its own.

use rayon::prelude::*;

use super::Activation;
use crate::exp::exp;
use crate::frozen::wide::widest;
use crate::rewritten::Rewritten;

/// Numbers of one task: what is read and written fits a core's own cache.
const TASK: usize = 16 << 10;

/// `activation(gate) * up` in place of `gate`.
///
/// # Panics
/// Where there are not as many of both.
pub fn forward(gate: Rewritten, up: &[f32], activation: Activation) {
    match activation {
        Activation::Silu => forward_by(gate, up, silu),
        Activation::GeluTanh => forward_by(gate, up, gelu_tanh),
    }
}

/// The gradients at `gate` and `up`, each in its place.
pub fn backward(gate: Rewritten, up: Rewritten, dy: &[f32], activation: Activation) {
    match activation {
        Activation::Silu => backward_by(gate, up, dy, silu),
        Activation::GeluTanh => backward_by(gate, up, dy, gelu_tanh),
    }
}

#[inline(always)]
fn forward_by(gate: Rewritten, up: &[f32], activation: impl Fn(f32) -> [f32; 2] + Copy + Sync + Send) {
    assert_eq!(gate.len(), up.len(), "as many gates as numbers to gate");
    gate.pieces(TASK).zip(up.par_chunks(TASK)).for_each(|(gate, up)| {
        widest!(|| {
            for (gate, up) in gate.iter_mut().zip(up) {
                let [value, _] = activation(*gate);
                *gate = value * up;
            }
        });
    });
}

#[inline(always)]
fn backward_by(
    gate: Rewritten,
    up: Rewritten,
    dy: &[f32],
    activation: impl Fn(f32) -> [f32; 2] + Copy + Sync + Send,
) {
    assert!(
        gate.len() == up.len() && up.len() == dy.len(),
        "as many gates as numbers to gate, and gradients"
    );
    gate.pieces(TASK).zip(up.pieces(TASK)).zip(dy.par_chunks(TASK)).for_each(|((gate, up), dy)| {
        widest!(|| {
            for ((gate, up), dy) in gate.iter_mut().zip(up.iter_mut()).zip(dy) {
                let [value, slope] = activation(*gate);
                *gate = dy * *up * slope;
                *up = dy * value;
            }
        });
    });
}

/// `x * sigmoid(x)`, and its slope.
#[inline(always)]
fn silu(x: f32) -> [f32; 2] {
    let sigmoid = sigmoid(x);
    let value = x * sigmoid;
    [value, sigmoid * (1.0 + x - value)]
}

/// The tanh form of GELU, and its slope: `(1 + tanh(u)) / 2` is `sigmoid(2 u)`.
#[inline(always)]
fn gelu_tanh(x: f32) -> [f32; 2] {
    #[allow(clippy::excessive_precision)] // the digits that there are
    const TWICE: f32 = 1.595_769_1; // 2 sqrt(2 / pi)
    const CUBE: f32 = 0.044_715;
    let square = x * x;
    let sigmoid = sigmoid(TWICE * x * (1.0 + CUBE * square));
    let value = x * sigmoid;
    [value, sigmoid + value * (1.0 - sigmoid) * TWICE * (1.0 + 3.0 * CUBE * square)]
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}
