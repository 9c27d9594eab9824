//! Dropout on CubeCL's graphics cards, number by number.

// What `cube` makes of a function is documented by the function.
#![allow(missing_docs)]
// CubeCL reads these functions as text: it wants `x = x + y`, plain numbers and values as they are.
#![allow(clippy::pedantic)]

use burn::backend::{Cube, TensorMetadata};
use burn::tensor::DType;
use burn_cubecl::cubecl;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{Mask, Masked};
use crate::card::{addresses, elements, empty};
use crate::random::on_card::{number, row_key};

impl Masked for Cube {
    fn masked(x: CubeTensor, mask: Mask) -> CubeTensor {
        let x = into_contiguous(x);
        let y = empty(&x, x.shape(), DType::F32);
        let (numbers, width) = (x.shape().num_elements(), x.shape()[1]);
        if numbers == 0 {
            return y;
        }
        let (count, dim) = elements(&x.client, numbers);
        let [first, second] = mask.bits.key();
        // SAFETY: a unit reads and writes one of `numbers` numbers, of which both tensors have as many.
        #[allow(unsafe_code)]
        unsafe {
            masked::launch_unchecked(
                &x.client.clone(),
                count,
                dim,
                addresses(&[&x]),
                x.into_buffer_arg(),
                y.clone().into_buffer_arg(),
                numbers,
                width,
                first,
                second,
                mask.least,
                mask.scale,
            );
        }
        y
    }
}

/// The loop of [`Mask::apply`].
#[cube(launch_unchecked, address_type = "dynamic")]
fn masked(
    x: &[f32],
    y: &mut [f32],
    numbers: usize,
    width: usize,
    first: u32,
    second: u32,
    least: u32,
    scale: f32,
) {
    if ABSOLUTE_POS >= numbers {
        terminate!();
    }
    let (token, feature) = (ABSOLUTE_POS / width, ABSOLUTE_POS % width);
    let (row, beside) = row_key(token as u32, first, second);
    if number(feature as u32, row, beside) < least {
        y[ABSOLUTE_POS] = 0.0;
    } else {
        y[ABSOLUTE_POS] = x[ABSOLUTE_POS] * scale;
    }
}
