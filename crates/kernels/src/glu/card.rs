//! The gated unit on CubeCL's graphics cards, number by number.

// What `cube` makes of a function is documented by the function.
#![allow(missing_docs)]
// CubeCL reads these functions as text: it wants `x = x + y`, plain numbers and values as they are.
#![allow(clippy::pedantic, clippy::style, clippy::complexity)]

use burn::backend::{Cube, TensorMetadata};
use burn::tensor::DType;
use burn_cubecl::cubecl;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{Activation, Glu, GluLoops};
use crate::card::{addresses, elements, empty, lanes};

impl Glu for Cube {
    fn glu(gate: CubeTensor, up: CubeTensor, activation: Activation, _: bool) -> CubeTensor {
        let (gate, up) = (into_contiguous(gate), into_contiguous(up));
        let y = empty(&gate, gate.shape(), DType::F32);
        let numbers = gate.shape().num_elements();
        if numbers == 0 {
            return y;
        }
        let vectors = numbers / lanes(numbers);
        let (count, dim) = elements(&gate.client, vectors);
        // SAFETY: a unit reads and writes one of `vectors` vectors, of which all three tensors have as many.
        #[allow(unsafe_code)]
        unsafe {
            gated::launch_unchecked(
                &gate.client.clone(),
                count,
                dim,
                addresses(&[&gate]),
                lanes(numbers),
                gate.into_buffer_arg(),
                up.into_buffer_arg(),
                y.clone().into_buffer_arg(),
                vectors,
                activation,
            );
        }
        y
    }
}

impl GluLoops for Cube {
    type Kept = (CubeTensor, CubeTensor);

    fn forward(
        gate: CubeTensor,
        up: CubeTensor,
        activation: Activation,
        halves: bool,
    ) -> (CubeTensor, Self::Kept) {
        let (gate, up) = (into_contiguous(gate), into_contiguous(up));
        (Cube::glu(gate.clone(), up.clone(), activation, halves), (gate, up))
    }

    fn backward((gate, up): Self::Kept, dy: CubeTensor, activation: Activation) -> (CubeTensor, CubeTensor) {
        let dy = into_contiguous(dy);
        let at = || empty(&gate, gate.shape(), DType::F32);
        let (at_gate, at_up) = (at(), at());
        let numbers = gate.shape().num_elements();
        if numbers == 0 {
            return (at_gate, at_up);
        }
        let vectors = numbers / lanes(numbers);
        let (count, dim) = elements(&gate.client, vectors);
        // SAFETY: as above, of five tensors.
        #[allow(unsafe_code)]
        unsafe {
            pulled_back::launch_unchecked(
                &gate.client.clone(),
                count,
                dim,
                addresses(&[&gate]),
                lanes(numbers),
                gate.into_buffer_arg(),
                up.into_buffer_arg(),
                dy.into_buffer_arg(),
                at_gate.clone().into_buffer_arg(),
                at_up.clone().into_buffer_arg(),
                vectors,
                activation,
            );
        }
        (at_gate, at_up)
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn gated<N: Size>(
    gate: &[Vector<f32, N>],
    up: &[Vector<f32, N>],
    y: &mut [Vector<f32, N>],
    vectors: usize,
    #[comptime] activation: Activation,
) {
    if ABSOLUTE_POS >= vectors {
        terminate!();
    }
    let (value, _) = value_and_slope(gate[ABSOLUTE_POS], activation);
    y[ABSOLUTE_POS] = value * up[ABSOLUTE_POS];
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn pulled_back<N: Size>(
    gate: &[Vector<f32, N>],
    up: &[Vector<f32, N>],
    dy: &[Vector<f32, N>],
    at_gate: &mut [Vector<f32, N>],
    at_up: &mut [Vector<f32, N>],
    vectors: usize,
    #[comptime] activation: Activation,
) {
    if ABSOLUTE_POS >= vectors {
        terminate!();
    }
    let (value, slope) = value_and_slope(gate[ABSOLUTE_POS], activation);
    at_gate[ABSOLUTE_POS] = dy[ABSOLUTE_POS] * up[ABSOLUTE_POS] * slope;
    at_up[ABSOLUTE_POS] = dy[ABSOLUTE_POS] * value;
}

/// The formulas are those of the processor's loops, `gates.rs`.
#[cube]
fn value_and_slope<N: Size>(
    x: Vector<f32, N>,
    #[comptime] activation: Activation,
) -> (Vector<f32, N>, Vector<f32, N>) {
    let one = Vector::<f32, N>::new(1.0f32);
    match comptime![activation] {
        Activation::Silu => {
            let sigmoid = sigmoid(x);
            let value = x * sigmoid;
            (value, sigmoid * (one + x - value))
        }
        Activation::GeluTanh => {
            let twice = Vector::<f32, N>::new(1.595_769_1f32); // 2 sqrt(2 / pi)
            let cube = Vector::<f32, N>::new(0.044_715f32);
            let three = Vector::<f32, N>::new(3.0f32);
            let square = x * x;
            let sigmoid = sigmoid(twice * x * (one + cube * square));
            let value = x * sigmoid;
            (value, sigmoid + value * (one - sigmoid) * twice * (one + three * cube * square))
        }
    }
}

#[cube]
fn sigmoid<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    let one = Vector::<f32, N>::new(1.0f32);
    one / (one + (Vector::<f32, N>::new(0.0f32) - x).exp())
}
