//! The update on CubeCL's graphics cards: the products with the small factors are the card's, the sum is one pass over
//! `y`.

// What `cube` makes of a function is documented by the function.
#![allow(missing_docs)]
// CubeCL reads these functions as text: it wants `x = x + y`, plain numbers and values as they are.
#![allow(clippy::pedantic)]

use burn::backend::ops::FloatTensorOps;
use burn::backend::{Cube, TensorMetadata};
use burn::tensor::DType;
use burn_cubecl::cubecl;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{LowRankLoops, Scaling};
use crate::card::{addresses, elements, empty, lanes, multiply};
use crate::dropout::Masked;

impl LowRankLoops for Cube {
    fn forward(
        y: CubeTensor,
        x: &CubeTensor,
        [a, b]: [&CubeTensor; 2],
        scaling: Scaling,
    ) -> (CubeTensor, CubeTensor) {
        let y = into_contiguous(y);
        let low =
            Cube::float_mul_scalar(multiply(masked(x.clone(), scaling), turned(a)), scaling.scale.into());
        let [tokens, width] = [y.shape()[0], y.shape()[1]];
        let sum = empty(&y, y.shape(), DType::F32);
        if tokens * width == 0 {
            return (sum, low);
        }
        // Of `b`, as of `y`, a unit takes neighbours: `[rank, out]`.
        let factors = into_contiguous(turned(b));
        let lanes = lanes(width);
        let vectors = tokens * width / lanes;
        let (count, dim) = elements(&y.client, vectors);
        // SAFETY: a unit reads and writes one of the `vectors` vectors of `y` and `sum`, and reads its token's row of
        // `low` and its columns of the factors, which have as many rows.
        #[allow(unsafe_code)]
        unsafe {
            add_product::launch_unchecked(
                &y.client.clone(),
                count,
                dim,
                addresses(&[&y]),
                lanes,
                y.into_buffer_arg(),
                low.clone().into_buffer_arg(),
                factors.into_buffer_arg(),
                sum.clone().into_buffer_arg(),
                vectors,
                width / lanes,
                low.shape()[1],
            );
        }
        (sum, low)
    }

    fn backward(
        dy: &CubeTensor,
        x: &CubeTensor,
        dx: Option<CubeTensor>,
        [a, b]: [&CubeTensor; 2],
        low: &CubeTensor,
        scaling: Scaling,
        [to_x, to_a, to_b]: [bool; 3],
    ) -> [Option<CubeTensor>; 3] {
        // [tokens, rank]
        let at_low = Cube::float_mul_scalar(multiply(dy.clone(), b.clone()), scaling.scale.into());
        let at_x = || {
            let at_x = masked(multiply(at_low.clone(), a.clone()), scaling);
            match dx {
                Some(dx) => Cube::float_add(dx, at_x),
                None => at_x,
            }
        };
        let at_a = || multiply(turned(&at_low), masked(x.clone(), scaling));
        let at_b = || multiply(turned(dy), low.clone());
        [to_x.then(at_x), to_a.then(at_a), to_b.then(at_b)]
    }
}

/// `x` behind the dropout, where there is one.
fn masked(x: CubeTensor, scaling: Scaling) -> CubeTensor {
    match scaling.mask {
        Some(mask) => Cube::masked(x, mask),
        None => x,
    }
}

fn turned(x: &CubeTensor) -> CubeTensor {
    Cube::float_transpose(x.clone())
}

/// `y + low b`; `width` counts the vectors of a row.
#[cube(launch_unchecked, address_type = "dynamic")]
fn add_product<N: Size>(
    y: &[Vector<f32, N>],
    low: &[f32],
    b: &[Vector<f32, N>],
    sum: &mut [Vector<f32, N>],
    vectors: usize,
    width: usize,
    rank: usize,
) {
    if ABSOLUTE_POS >= vectors {
        terminate!();
    }
    let (token, at) = (ABSOLUTE_POS / width, ABSOLUTE_POS % width);
    let mut numbers = y[ABSOLUTE_POS];
    for r in 0..rank {
        numbers += Vector::new(low[token * rank + r]) * b[r * width + at];
    }
    sum[ABSOLUTE_POS] = numbers;
}
