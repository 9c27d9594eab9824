//! Pairs of features, turned.

use rayon::prelude::*;

use crate::direction::Direction;
use crate::frozen::wide::widest;
use crate::rewritten::Rewritten;

/// Tokens of one task.
const TASK: usize = 16;

/// Turns every head of `x` in its place.
///
/// # Shapes
/// - x: `[tokens, heads, head_dim]`; cos, sin: `[tokens, half]`, half a `head_dim` each
///
/// # Panics
/// Where there are more or fewer tokens than angles.
pub fn turn(x: Rewritten, [cos, sin]: [&[f32]; 2], [heads, half]: [usize; 2], direction: Direction) {
    let width = heads * 2 * half;
    assert!(cos.len() * 2 * heads == x.len() && cos.len() == sin.len(), "angles for every token");
    let tables = cos.par_chunks(TASK * half).zip(sin.par_chunks(TASK * half));
    x.pieces(TASK * width).zip(tables).for_each(|(x, (cos, sin))| {
        widest!(|| {
            let angles = cos.chunks_exact(half).zip(sin.chunks_exact(half));
            for (token, (cos, sin)) in x.chunks_exact_mut(width).zip(angles) {
                for head in token.chunks_exact_mut(2 * half) {
                    match direction {
                        Direction::Forward => turn_head(head, cos, sin, |sin| sin),
                        Direction::Backward => turn_head(head, cos, sin, |sin| -sin),
                    }
                }
            }
        });
    });
}

#[inline(always)]
fn turn_head(head: &mut [f32], cos: &[f32], sin: &[f32], sign: impl Fn(f32) -> f32) {
    let (first, second) = head.split_at_mut(cos.len());
    for (((x1, x2), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        let sin = sign(*sin);
        (*x1, *x2) = (*x1 * cos - *x2 * sin, *x2 * cos + *x1 * sin);
    }
}
