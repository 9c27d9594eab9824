//! Losses and their gradients on CubeCL's graphics cards, a plane a row of logits.

// What `cube` makes of a function is documented by the function.
#![allow(missing_docs)]
// CubeCL reads these functions as text: it wants `x = x + y`, plain numbers and values as they are.
#![allow(clippy::pedantic)]

use std::sync::Arc;

use burn::backend::ops::IntTensorOps;
use burn::backend::{Cube, TensorMetadata};
use burn::tensor::{DType, TensorData};
use burn_cubecl::cubecl;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::LossesAndSlopes;
use crate::card::{
    addresses, element, empty, is_alone, lanes, max_of_plane, planes, row_of_plane, sum_of_plane,
    unit_of_plane,
};

impl LossesAndSlopes for Cube {
    fn losses_and_slopes(logits: CubeTensor, targets: Arc<[u32]>) -> (CubeTensor, CubeTensor) {
        let logits = into_contiguous(logits);
        let [rows, vocab] = [logits.shape()[0], logits.shape()[1]];
        assert_eq!(rows, targets.len(), "a target for every row");
        assert!(targets.iter().all(|&target| (target as usize) < vocab), "targets that are columns");
        let ids: Vec<i32> = targets.iter().map(|&target| target as i32).collect();
        let ids = Self::int_from_data(TensorData::new(ids, [rows]), &logits.device);
        let (losses, slopes) =
            (empty(&logits, [rows], DType::F32), empty(&logits, logits.shape(), DType::F32));
        if rows * vocab == 0 {
            return (losses, slopes);
        }
        let (count, dim) = planes(&logits.client, rows);
        let (lanes, id_type) = (lanes(vocab), ids.dtype);
        // SAFETY: a plane reads and writes a row of `vocab` numbers, of which there are `rows`; targets are columns.
        #[allow(unsafe_code)]
        unsafe {
            softmax_less_target::launch_unchecked(
                &logits.client.clone(),
                count,
                dim,
                addresses(&[&logits]),
                lanes,
                logits.into_buffer_arg(),
                ids.into_buffer_arg(),
                losses.clone().into_buffer_arg(),
                slopes.clone().into_buffer_arg(),
                rows,
                vocab / lanes,
                is_alone(&losses.client),
                element(id_type),
            );
        }
        (losses, slopes)
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn softmax_less_target<I: Int, N: Size>(
    logits: &[Vector<f32, N>],
    targets: &[I],
    losses: &mut [f32],
    slopes: &mut [Vector<f32, N>],
    rows: usize,
    vectors: usize,
    #[comptime] alone: bool,
    #[define(I)] _type: ElemType,
) {
    let row = row_of_plane();
    if row >= rows {
        terminate!();
    }
    let start = row * vectors;
    let (unit, units) = unit_of_plane();
    let mut tops = logits[start];
    for i in range_stepped(unit, vectors, units) {
        tops = tops.max(logits[start + i]);
    }
    let lanes = tops.vector_size();
    let mut top = tops.extract(0usize);
    #[unroll]
    for lane in 1usize..lanes {
        top = top.max(tops.extract(lane));
    }
    let top = max_of_plane(top, alone);
    let mut sums = Vector::<f32, N>::new(0.0f32);
    for i in range_stepped(unit, vectors, units) {
        sums += (logits[start + i] - Vector::new(top)).exp();
    }
    let sum = sum_of_plane(sums.vector_sum(), alone);
    let target = usize::cast_from(targets[row]);
    let share = 1.0f32 / sum;
    for i in range_stepped(unit, vectors, units) {
        let mut p = (logits[start + i] - Vector::new(top)).exp() * Vector::new(share);
        if i == target / lanes {
            let at_target = target % lanes;
            let logit = logits[start + i].extract_dynamic(at_target);
            losses[row] = sum.ln() + top - logit;
            let less = p.extract_dynamic(at_target) - 1.0f32;
            p.insert_dynamic(at_target, less);
        }
        slopes[start + i] = p;
    }
}
