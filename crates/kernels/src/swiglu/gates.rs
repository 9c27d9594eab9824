//! The gated activation, number by number.

use rayon::prelude::*;

use crate::exp::exp;
use crate::frozen::wide::widest;
use crate::rewritten::Rewritten;

/// Numbers of one task: what is read and written fits a core's own cache.
const TASK: usize = 16 << 10;

/// `silu(gate) * up` in place of `gate`.
///
/// # Panics
/// Where there are not as many of both.
pub fn forward(gate: Rewritten, up: &[f32]) {
    assert_eq!(gate.len(), up.len(), "as many gates as numbers to gate");
    gate.pieces(TASK).zip(up.par_chunks(TASK)).for_each(|(gate, up)| {
        widest(|| {
            for (gate, up) in gate.iter_mut().zip(up) {
                *gate = *gate * sigmoid(*gate) * up;
            }
        });
    });
}

/// The gradients at `gate` and `up`, each in its place.
pub fn backward(gate: Rewritten, up: Rewritten, dy: &[f32]) {
    gate.pieces(TASK).zip(up.pieces(TASK)).zip(dy.par_chunks(TASK)).for_each(|((gate, up), dy)| {
        widest(|| {
            for ((gate, up), dy) in gate.iter_mut().zip(up.iter_mut()).zip(dy) {
                let sigmoid = sigmoid(*gate);
                let silu = *gate * sigmoid;
                let slope = sigmoid * (1.0 + *gate - silu); // d silu / d gate
                *gate = dy * *up * slope;
                *up = dy * silu;
            }
        });
    });
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}
