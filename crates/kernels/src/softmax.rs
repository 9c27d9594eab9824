//! Softmax of rows, and its pullback, where a row sees only some of its scores.

// Loops have to end up inside the functions of `wide` that are compiled for wider vectors.
#![allow(clippy::inline_always)]

use std::ops::Range;

use crate::exp::exp;

/// Lanes that sums and maxima run in, whatever the processor's vectors are, so that results are
/// the same everywhere.
const LANES: usize = 16;

/// Replaces the scores in `sees` by their exponentials, divided by the largest, and the others
/// by zero. Returns the largest score and the sum.
#[inline(always)]
pub fn exponentials(scores: &mut [f32], sees: Range<usize>) -> (f32, f32) {
    let top = largest(&scores[sees.clone()]);
    (top, exponentials_below(scores, sees, top))
}

/// Replaces the scores in `sees` by `exp(score - top)`, the others by zero. Returns the sum.
#[inline(always)]
pub fn exponentials_below(scores: &mut [f32], sees: Range<usize>, top: f32) -> f32 {
    let (scores, future) = scores.split_at_mut(sees.end);
    let (past, seen) = scores.split_at_mut(sees.start);
    past.fill(0.0);
    future.fill(0.0);
    let mut sums = [0.0_f32; LANES];
    let (lanes, rest) = seen.as_chunks_mut::<LANES>();
    for lane in lanes {
        for i in 0..LANES {
            lane[i] = exp(lane[i] - top);
            sums[i] += lane[i];
        }
    }
    let mut sum = sums.iter().sum();
    for score in rest {
        *score = exp(*score - top);
        sum += *score;
    }
    sum
}

/// `slopes = weights * (slopes - sum(weights * slopes))`: the gradient at the scores, in place of
/// that at the softmax `weights`.
#[inline(always)]
pub fn pull_back(weights: &[f32], slopes: &mut [f32]) {
    let mut sums = [0.0_f32; LANES];
    let (w_lanes, w_rest) = weights.as_chunks::<LANES>();
    let (s_lanes, s_rest) = slopes.as_chunks::<LANES>();
    for (w, s) in w_lanes.iter().zip(s_lanes) {
        for i in 0..LANES {
            sums[i] += w[i] * s[i];
        }
    }
    let rest: f32 = w_rest.iter().zip(s_rest).map(|(w, s)| w * s).sum();
    let sum = sums.iter().sum::<f32>() + rest;
    for (slope, weight) in slopes.iter_mut().zip(weights) {
        *slope = weight * (*slope - sum);
    }
}

#[inline(always)]
fn largest(scores: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut tops = [f32::NEG_INFINITY; LANES];
    let (lanes, rest) = scores.as_chunks::<LANES>();
    for lane in lanes {
        for i in 0..LANES {
            tops[i] = larger(tops[i], lane[i]);
        }
    }
    tops.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| larger(a, *b))
}
