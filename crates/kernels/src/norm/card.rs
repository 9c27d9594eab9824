//! The normalization on CubeCL's graphics cards, a plane a row.

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

use super::NormLoops;
use crate::card::{addresses, empty, is_alone, lanes, planes, row_of_plane, sum_of_plane, unit_of_plane};

impl NormLoops for Cube {
    fn forward(x: CubeTensor, weight: &CubeTensor, eps: f32) -> (CubeTensor, CubeTensor) {
        let x = into_contiguous(x);
        let [rows, width] = [x.shape()[0], x.shape()[1]];
        let (y, scales) = (empty(&x, x.shape(), DType::F32), empty(&x, [rows], DType::F32));
        if rows * width == 0 {
            return (y, scales);
        }
        let (count, dim) = planes(&x.client, rows);
        // SAFETY: a plane reads and writes a row of `width` numbers, and there are `rows` of them.
        #[allow(unsafe_code)]
        unsafe {
            norm_rows::launch_unchecked(
                &x.client.clone(),
                count,
                dim,
                addresses(&[&x]),
                lanes(width),
                x.into_buffer_arg(),
                weight.clone().into_buffer_arg(),
                y.clone().into_buffer_arg(),
                scales.clone().into_buffer_arg(),
                rows,
                width / lanes(width),
                width as f32,
                eps,
                is_alone(&y.client),
            );
        }
        (y, scales)
    }

    fn backward(
        dy: CubeTensor,
        beside: Option<CubeTensor>,
        x: &CubeTensor,
        weight: &CubeTensor,
        scales: &CubeTensor,
    ) -> CubeTensor {
        let dy = into_contiguous(dy);
        let [rows, width] = [x.shape()[0], x.shape()[1]];
        let dx = empty(x, x.shape(), DType::F32);
        if rows * width == 0 {
            return dx;
        }
        let (count, dim) = planes(&x.client, rows);
        // SAFETY: as above.
        #[allow(unsafe_code)]
        unsafe {
            pull_back_rows::launch_unchecked(
                &x.client,
                count,
                dim,
                addresses(&[x]),
                lanes(width),
                dy.into_buffer_arg(),
                x.clone().into_buffer_arg(),
                weight.clone().into_buffer_arg(),
                scales.clone().into_buffer_arg(),
                dx.clone().into_buffer_arg(),
                rows,
                width / lanes(width),
                width as f32,
                is_alone(&x.client),
            );
        }
        match beside {
            Some(beside) => Cube::float_add(dx, beside),
            None => dx,
        }
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn norm_rows<N: Size>(
    x: &[Vector<f32, N>],
    weight: &[Vector<f32, N>],
    y: &mut [Vector<f32, N>],
    scales: &mut [f32],
    rows: usize,
    vectors: usize,
    width: f32,
    eps: f32,
    #[comptime] alone: bool,
) {
    let row = row_of_plane();
    if row >= rows {
        terminate!();
    }
    let start = row * vectors;
    let (unit, units) = unit_of_plane();
    let mut squares = Vector::<f32, N>::new(0.0f32);
    for i in range_stepped(unit, vectors, units) {
        let v = x[start + i];
        squares += v * v;
    }
    let mean = sum_of_plane(squares.vector_sum(), alone) / width;
    let scale = 1.0f32 / (mean + eps).sqrt();
    for i in range_stepped(unit, vectors, units) {
        y[start + i] = x[start + i] * Vector::new(scale) * weight[i];
    }
    if unit == 0 {
        scales[row] = scale;
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn pull_back_rows<N: Size>(
    dy: &[Vector<f32, N>],
    x: &[Vector<f32, N>],
    weight: &[Vector<f32, N>],
    scales: &[f32],
    dx: &mut [Vector<f32, N>],
    rows: usize,
    vectors: usize,
    width: f32,
    #[comptime] alone: bool,
) {
    let row = row_of_plane();
    if row >= rows {
        terminate!();
    }
    let start = row * vectors;
    let (unit, units) = unit_of_plane();
    let mut along = Vector::<f32, N>::new(0.0f32);
    for i in range_stepped(unit, vectors, units) {
        along += dy[start + i] * weight[i] * x[start + i];
    }
    let scale = scales[row];
    let along = scale * scale * sum_of_plane(along.vector_sum(), alone) / width;
    for i in range_stepped(unit, vectors, units) {
        let g = dy[start + i] * weight[i] - x[start + i] * Vector::new(along);
        dx[start + i] = g * Vector::new(scale);
    }
}
