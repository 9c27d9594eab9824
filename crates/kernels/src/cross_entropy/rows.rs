//! Losses and their gradients, a row of logits at a time.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use crate::frozen::wide::widest;
use crate::rewritten::Rewritten;
use crate::softmax::exponentials;

/// Replaces each row of logits by `softmax(row) - onehot(target)` and writes its
/// `-log softmax(row)[target]`.
///
/// # Panics
/// Where there are not as many losses as targets, the logits are no whole rows of as many, or a
/// target is none of a row's columns.
pub fn losses_and_slopes(logits: Rewritten, targets: &[u32], losses: &mut [MaybeUninit<f32>]) {
    assert_eq!(losses.len(), targets.len(), "a loss for every target");
    let vocab = logits.len() / targets.len().max(1);
    assert_eq!(vocab * targets.len(), logits.len(), "a target for every row");
    let rows = logits.pieces(vocab.max(1)).zip(targets).zip(losses);
    rows.for_each(|((row, &target), loss)| {
        loss.write(widest!(|| softmax_less_target(row, target as usize)));
    });
}

#[inline(always)]
fn softmax_less_target(row: &mut [f32], target: usize) -> f32 {
    let (at_target, columns) = (row[target], row.len());
    let (top, sum) = exponentials(row, 0..columns);
    let scale = 1.0 / sum;
    for x in &mut *row {
        *x *= scale;
    }
    row[target] -= 1.0;
    sum.ln() + top - at_target
}
