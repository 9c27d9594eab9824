//! Rotary position embedding on CubeCL's graphics cards: a unit turns a few pairs of features.

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

use super::RotaryTurn;
use crate::card::{addresses, elements, empty, lanes};
use crate::direction::Direction;

impl RotaryTurn for Cube {
    fn turn(x: CubeTensor, cos: CubeTensor, sin: CubeTensor, direction: Direction) -> CubeTensor {
        let [x, cos, sin] = [x, cos, sin].map(into_contiguous);
        let [heads, half] = [x.shape()[1], x.shape()[2] / 2];
        assert_eq!(cos.shape()[2], half, "an angle for every pair of features");
        let y = empty(&x, x.shape(), DType::F32);
        let lanes = lanes(half);
        let vectors = x.shape().num_elements() / 2 / lanes;
        if vectors == 0 {
            return y;
        }
        let (count, dim) = elements(&x.client, vectors);
        let backwards = if direction == Direction::Forward { 1.0f32 } else { -1.0 };
        // SAFETY: a unit reads and writes a vector of each half of a head, of which there are `vectors` in all,
        // and the angles of its token.
        #[allow(unsafe_code)]
        unsafe {
            turned::launch_unchecked(
                &x.client.clone(),
                count,
                dim,
                addresses(&[&x]),
                lanes,
                x.into_buffer_arg(),
                cos.into_buffer_arg(),
                sin.into_buffer_arg(),
                y.clone().into_buffer_arg(),
                vectors,
                half / lanes,
                heads,
                backwards,
            );
        }
        y
    }
}

/// `half` counts the vectors of half a head; `sign` turns the other way.
#[cube(launch_unchecked, address_type = "dynamic")]
fn turned<N: Size>(
    x: &[Vector<f32, N>],
    cos: &[Vector<f32, N>],
    sin: &[Vector<f32, N>],
    y: &mut [Vector<f32, N>],
    vectors: usize,
    half: usize,
    heads: usize,
    sign: f32,
) {
    if ABSOLUTE_POS >= vectors {
        terminate!();
    }
    let (head, i) = (ABSOLUTE_POS / half, ABSOLUTE_POS % half);
    let first = head * 2 * half + i;
    let angle = head / heads * half + i;
    let (x1, x2) = (x[first], x[first + half]);
    let (cos, sin) = (cos[angle], sin[angle] * Vector::new(sign));
    y[first] = x1 * cos - x2 * sin;
    y[first + half] = x2 * cos + x1 * sin;
}
