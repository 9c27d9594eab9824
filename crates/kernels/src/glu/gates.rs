//! The gated unit, number by number. Each activation has loops of its own.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::Activation;
use crate::bf16::round;
use crate::exp::exp;
use crate::frozen::wide::widest;
use crate::rewritten::Rewritten;

/// Numbers of one task: what is read and written fits a core's own cache.
const TASK: usize = 16 << 10;

/// `activation(gate) * up` in place of `gate`, by all cores.
///
/// # Panics
/// Where there are not as many of both.
pub fn forward(gate: Rewritten, up: &[f32], activation: Activation) {
    assert_eq!(gate.len(), up.len(), "as many gates as numbers to gate");
    let pieces = gate.pieces(TASK).zip(up.par_chunks(TASK));
    pieces.for_each(|(gate, up)| forward_piece(gate, up, activation));
}

/// The same by this core alone.
pub fn forward_piece(gate: &mut [f32], up: &[f32], activation: Activation) {
    match activation {
        Activation::Silu => forward_by(gate, up, silu),
        Activation::GeluTanh => forward_by(gate, up, gelu_tanh),
    }
}

#[inline(always)]
fn forward_by(gate: &mut [f32], up: &[f32], activation: impl Fn(f32) -> [f32; 2]) {
    widest!(|| {
        for (gate, up) in gate.iter_mut().zip(up) {
            let [value, _] = activation(*gate);
            *gate = value * up;
        }
    });
}

/// The gradients at `gate` and `up`, each in its place, by all cores.
///
/// # Panics
/// Where there are not as many of all.
pub fn backward(gate: Rewritten, up: Rewritten, dy: &[f32], activation: Activation) {
    assert!(
        gate.len() == up.len() && up.len() == dy.len(),
        "as many gates as numbers to gate, and gradients"
    );
    let pieces = gate.pieces(TASK).zip(up.pieces(TASK)).zip(dy.par_chunks(TASK));
    pieces.for_each(|((gate, up), dy)| match activation {
        Activation::Silu => backward_by(gate, up, dy, silu),
        Activation::GeluTanh => backward_by(gate, up, dy, gelu_tanh),
    });
}

#[inline(always)]
fn backward_by(gate: &mut [f32], up: &mut [f32], dy: &[f32], activation: impl Fn(f32) -> [f32; 2]) {
    widest!(|| {
        for ((gate, up), dy) in gate.iter_mut().zip(up.iter_mut()).zip(dy) {
            let [value, slope] = activation(*gate);
            *gate = dy * *up * slope;
            *up = dy * value;
        }
    });
}

/// Numbers of each that are kept side by side: gates, then what they gate.
pub const TURN: usize = 1024;

/// How many numbers are kept of so many gates: whole turns.
pub fn kept_of(gates: usize) -> usize {
    2 * gates.next_multiple_of(TURN)
}

/// [`forward`], and both in bf16 to all of `kept`, by turns; zeros behind the last.
///
/// # Panics
/// Where there are not as many of both, or not [`kept_of`] them are kept.
pub fn forward_kept(gate: Rewritten, up: &[f32], kept: &mut [MaybeUninit<u16>], activation: Activation) {
    assert_eq!(gate.len(), up.len(), "as many gates as numbers to gate");
    assert_eq!(kept.len(), kept_of(gate.len()), "room for both");
    let pieces = gate.pieces(TASK).zip(up.par_chunks(TASK)).zip(kept.par_chunks_mut(2 * TASK));
    pieces.for_each(|((gate, up), kept)| {
        keep(gate, up, kept);
        forward_piece(gate, up, activation);
    });
}

fn keep(gate: &[f32], up: &[f32], kept: &mut [MaybeUninit<u16>]) {
    widest!(|| {
        let turns = kept.as_chunks_mut::<TURN>().0.as_chunks_mut::<2>().0;
        let (gates, last_gates) = gate.as_chunks::<TURN>();
        let (ups, last_ups) = up.as_chunks::<TURN>();
        let (whole, last) = turns.split_at_mut(gates.len());
        for ((gates, ups), [kept_gates, kept_ups]) in gates.iter().zip(ups).zip(whole) {
            round_all(gates, kept_gates);
            round_all(ups, kept_ups);
        }
        for [kept_gates, kept_ups] in last {
            round_all(last_gates, kept_gates);
            round_all(last_ups, kept_ups);
        }
    });
}

/// Rounds numbers to the beginning of `out`, zeros behind them.
#[inline(always)]
fn round_all(numbers: &[f32], out: &mut [MaybeUninit<u16>; TURN]) {
    let (here, behind) = out.split_at_mut(numbers.len());
    for (out, x) in here.iter_mut().zip(numbers) {
        out.write(round(*x));
    }
    for out in behind {
        out.write(0);
    }
}

/// The gradients at gates and at what they gate, from both as they are kept; the latter take the place of `dy`.
///
/// # Panics
/// Where there are not as many of all.
pub fn backward_kept(kept: &[u16], dy: Rewritten, gate: &mut [MaybeUninit<f32>], activation: Activation) {
    assert_eq!([gate.len(), kept.len()], [dy.len(), kept_of(dy.len())], "as many of all");
    let pieces = kept.par_chunks(2 * TASK).zip(dy.pieces(TASK)).zip(gate.par_chunks_mut(TASK));
    pieces.for_each(|((kept, dy), gate)| {
        backward_kept_by(kept, dy, gate, activation, |place, x| {
            place.write(x);
        });
    });
}

/// The same by this core alone, of which more may be kept.
pub fn backward_kept_piece(kept: &[u16], dy: &mut [f32], gate: &mut [f32], activation: Activation) {
    backward_kept_by(kept, dy, gate, activation, |place, x| *place = x);
}

#[inline(always)]
fn backward_kept_by<P>(
    kept: &[u16],
    dy: &mut [f32],
    at_gate: &mut [P],
    activation: Activation,
    put: impl Fn(&mut P, f32),
) {
    match activation {
        Activation::Silu => backward_kept_with(kept, dy, at_gate, silu, put),
        Activation::GeluTanh => backward_kept_with(kept, dy, at_gate, gelu_tanh, put),
    }
}

#[inline(always)]
fn backward_kept_with<P>(
    kept: &[u16],
    dy: &mut [f32],
    at_gate: &mut [P],
    activation: impl Fn(f32) -> [f32; 2],
    put: impl Fn(&mut P, f32),
) {
    assert!(at_gate.len() == dy.len() && kept.len() >= kept_of(dy.len()), "as many of all");
    widest!(|| {
        let turns = kept.as_chunks::<TURN>().0.as_chunks::<2>().0;
        let (dys, last_dy) = dy.as_chunks_mut::<TURN>();
        let (places, last_place) = at_gate.as_chunks_mut::<TURN>();
        // Whole turns by themselves: loops whose length is known take whole vectors.
        let (whole, last) = turns.split_at(dys.len());
        for ((turn, dy), at_gate) in whole.iter().zip(dys).zip(places) {
            backward_turn(turn, dy, at_gate, &activation, &put);
        }
        if let Some(turn) = last.first() {
            backward_turn(turn, last_dy, last_place, &activation, &put);
        }
    });
}

#[inline(always)]
fn backward_turn<P>(
    [gates, ups]: &[[u16; TURN]; 2],
    dy: &mut [f32],
    at_gate: &mut [P],
    activation: impl Fn(f32) -> [f32; 2],
    put: impl Fn(&mut P, f32),
) {
    let wide = |half: u16| f32::from_bits(u32::from(half) << 16);
    for ((gate, up), (dy, at_gate)) in gates.iter().zip(ups).zip(dy.iter_mut().zip(at_gate)) {
        let [value, slope] = activation(wide(*gate));
        put(at_gate, *dy * wide(*up) * slope);
        *dy *= value;
    }
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
