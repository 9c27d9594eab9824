//! Root mean square normalization, a row at a time.

use rayon::prelude::*;

use crate::dot::dot;
use crate::frozen::wide::widest;
use crate::rewritten::Rewritten;

/// Rows of one task, enough of them to be worth handing over.
const TASK: usize = 16;

/// `y = x / sqrt(mean(x^2) + eps) * weight` in place of `x`. Returns `1 / sqrt(..)` for each row.
pub fn forward(x: Rewritten, weight: &[f32], eps: f32) -> Vec<f32> {
    let width = weight.len();
    let rows = |rows: &mut [f32]| -> Vec<f32> {
        let mut scales = Vec::with_capacity(TASK);
        widest!(|| {
            for row in rows.chunks_exact_mut(width) {
                scales.push(normalize(row, weight, eps));
            }
        });
        scales
    };
    let scales: Vec<Vec<f32>> = x.pieces(TASK * width).map(rows).collect();
    scales.concat()
}

#[inline(always)]
fn normalize(x: &mut [f32], weight: &[f32], eps: f32) -> f32 {
    let mean_square = dot(x, x) / x.len() as f32;
    let scale = 1.0 / (mean_square + eps).sqrt();
    for (x, w) in x.iter_mut().zip(weight) {
        *x = *x * scale * w;
    }
    scale
}

/// The gradient at `x` in place of `dy`, from the `scales` that [`forward`] returned: with
/// `g = dy * weight` it is `scale * (g - x * scale^2 * mean(x * g))`. What `x` gets besides is added where there is such.
pub fn backward(dy: Rewritten, beside: Option<&[f32]>, x: &[f32], weight: &[f32], scales: &[f32]) {
    let width = weight.len();
    assert!(
        dy.len() == x.len() && x.len() == scales.len() * width,
        "a gradient for every number, a scale a row"
    );
    assert!(beside.is_none_or(|beside| beside.len() == x.len()), "as many numbers besides");
    let inputs = x.par_chunks(TASK * width).zip(scales.par_chunks(TASK));
    dy.pieces(TASK * width).zip(inputs).enumerate().for_each(|(task, (dy, (x, scales)))| {
        let beside = beside.map(|beside| &beside[task * TASK * width..][..x.len()]);
        widest!(|| {
            let rows = dy.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(scales);
            for (row, ((dy, x), scale)) in rows.enumerate() {
                pull_back(dy, x, weight, *scale);
                if let Some(beside) = beside {
                    for (dx, beside) in dy.iter_mut().zip(&beside[row * width..]) {
                        *dx += beside;
                    }
                }
            }
        });
    });
}

#[inline(always)]
fn pull_back(dy: &mut [f32], x: &[f32], weight: &[f32], scale: f32) {
    for (dy, w) in dy.iter_mut().zip(weight) {
        *dy *= w;
    }
    let along = scale * scale * dot(dy, x) / x.len() as f32;
    for (dy, x) in dy.iter_mut().zip(x) {
        *dy = scale * (*dy - x * along);
    }
}
