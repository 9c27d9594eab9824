use burn::tensor::{Device, Tensor};
use pronk_kernels::{Dropout, DropoutKey, FrozenLinear, Precision, Scaling, Update, add_low_rank};

use crate::reference::{Input, check, frozen_layer, host, times_transposed};

const SCALE: f64 = 1.5;
const DROPOUT: Dropout = Dropout { p: 0.3, key: DropoutKey { seed: 1, step: 2, micro_batch: 3 } };
const LAYER: &str = "model.layers.0.self_attn.q_proj";

/// `y + SCALE * (x A^T) B^T`.
fn updated(y: &[f64], [x, a, b]: [&[f64]; 3], inputs: usize, rank: usize) -> Vec<f64> {
    let update = times_transposed(&times_transposed(x, a, inputs), b, rank);
    y.iter().zip(update).map(|(y, update)| y + SCALE * update).collect()
}

/// What is left of ones, `[tokens, inputs]`.
fn kept(tokens: usize, inputs: usize) -> Vec<f64> {
    host(&DROPOUT.apply(Tensor::ones([tokens, inputs], &Device::default()), LAYER))
}

fn masked(x: &[f64], kept: &[f64]) -> Vec<f64> {
    x.iter().zip(kept).map(|(x, kept)| x * kept).collect()
}

#[test]
fn odd_sizes_and_more_than_one_task() {
    let sizes = [
        [1, 3, 5, 1],
        [7, 13, 11, 3],
        [67, 130, 9, 4],
        [65, 5, 131, 8],
        [530, 2, 3, 2],
        [5, 64, 36, 16],
        [3, 35, 70, 11],
        [5, 9, 40, 30],
        [65, 130, 3, 17],
        [2, 3, 130, 17],
    ];
    for [tokens, inputs, outputs, rank] in sizes {
        let inputs_of_all = [
            Input::random([tokens, outputs], 1),
            Input::random([tokens, inputs], 2),
            Input::random([rank, inputs], 3),
            Input::random([outputs, rank], 4),
        ];
        let reference = |values: &[Vec<f64>]| -> Vec<f64> {
            let [y, x, a, b] = values else { panic!("four inputs") };
            updated(y, [x, a, b], inputs, rank)
        };
        check(
            &format!("{tokens} tokens, {inputs} to {outputs}, rank {rank}"),
            &inputs_of_all,
            |t| add_low_rank(t[0].clone(), t[1].clone(), &t[2], &t[3], SCALE),
            reference,
        );
    }
}

/// Of what is dropped, neither the adapter's part of the output nor its gradients see anything.
#[test]
fn a_mask_hides_features_from_the_adapter() {
    for [tokens, inputs, outputs, rank] in [[1, 3, 5, 1], [67, 65, 9, 4], [530, 2, 3, 2], [5, 9, 40, 30]] {
        let inputs_of_all = [
            Input::random([tokens, outputs], 1),
            Input::random([tokens, inputs], 2),
            Input::random([rank, inputs], 3),
            Input::random([outputs, rank], 4),
        ];
        let kept = kept(tokens, inputs);
        let scaling = Scaling { scale: SCALE, mask: DROPOUT.mask(LAYER) };
        check(
            &format!("{tokens} tokens, {inputs} to {outputs}, rank {rank}, with dropout"),
            &inputs_of_all,
            |t| add_low_rank(t[0].clone(), t[1].clone(), &t[2], &t[3], scaling),
            |values| updated(&values[0], [&masked(&values[1], &kept), &values[2], &values[3]], inputs, rank),
        );
    }
}

/// A layer and its adapter as one operation, with and without dropout in front of the adapter alone.
#[test]
fn a_layer_and_its_adapter_run_as_one() {
    for [tokens, inputs, outputs, rank] in [[1, 3, 5, 1], [67, 33, 9, 4], [6, 64, 36, 16], [5, 9, 40, 30]] {
        let (layer, weight) = frozen_layer([outputs, inputs], Precision::F32, 5);
        let factors = [
            Input::random([tokens, inputs], 2),
            Input::random([rank, inputs], 3),
            Input::random([outputs, rank], 4),
        ];
        for mask in [None, DROPOUT.mask(LAYER)] {
            let kept = if mask.is_some() { kept(tokens, inputs) } else { vec![1.0; tokens * inputs] };
            check(
                &format!("{tokens} tokens, {inputs} to {outputs}, rank {rank}, mask {mask:?}"),
                &factors,
                |t| {
                    let scaling = Scaling { scale: SCALE, mask };
                    let update = Update { a: t[1].clone(), b: t[2].clone(), scaling };
                    FrozenLinear::products(vec![(&layer, Some(update))], &t[0], None).remove(0)
                },
                |values| {
                    let y = times_transposed(&values[0], &weight, inputs);
                    updated(&y, [&masked(&values[0], &kept), &values[1], &values[2]], inputs, rank)
                },
            );
        }
    }
}
