//! Frozen layers that read one input.

use burn::tensor::Tensor;
use pronk_kernels::{FrozenLinear, Precision, Tracked, Update, pull_back};

use crate::reference::{
    Input, all_devices, assert_close, check, frozen_layer, host, times_transposed as product,
};

const SCALE: f64 = 1.5;
const RANK: usize = 4;
const WIDTHS: [usize; 3] = [36, 9, 70];

/// A layer, and its weight.
fn layer(shape: [usize; 2], seed: u64) -> (FrozenLinear, Vec<f64>) {
    frozen_layer(shape, Precision::F32, seed)
}

fn update(a: &Tensor<2>, b: &Tensor<2>) -> Update<Tensor<2>> {
    Update { a: a.clone(), b: b.clone(), scaling: SCALE.into() }
}

fn sum(x: &[f64], y: &[f64], scale: f64) -> Vec<f64> {
    x.iter().zip(y).map(|(x, y)| x + scale * y).collect()
}

/// Three layers, the first and the last with an adapter; the results stand one behind another in each row.
#[test]
fn layers_that_read_one_input_run_as_one() {
    for [tokens, inputs] in [[1, 3], [6, 64], [67, 33]] {
        let layers = [1, 2, 3].map(|i| layer([WIDTHS[i - 1], inputs], i as u64));
        let tensors = [
            Input::random([tokens, inputs], 4),
            Input::random([RANK, inputs], 5),
            Input::random([WIDTHS[0], RANK], 6),
            Input::random([RANK, inputs], 7),
            Input::random([WIDTHS[2], RANK], 8),
        ];
        check(
            &format!("{tokens} tokens of {inputs}"),
            &tensors,
            |t| {
                let updates = [Some(update(&t[1], &t[2])), None, Some(update(&t[3], &t[4]))];
                let layers = layers.iter().map(|(layer, _)| layer).zip(updates).collect();
                Tensor::cat(FrozenLinear::products(layers, &t[0], None), 1)
            },
            |values| {
                let results: Vec<_> = layers.iter().map(|(_, w)| product(&values[0], w, inputs)).collect();
                let updated = |i: usize, a: &[f64], b: &[f64]| {
                    sum(&results[i], &product(&product(&values[0], a, inputs), b, RANK), SCALE)
                };
                let results = [
                    updated(0, &values[1], &values[2]),
                    results[1].clone(),
                    updated(2, &values[3], &values[4]),
                ];
                let row = |token: usize| {
                    results.iter().zip(WIDTHS).flat_map(move |(y, width)| &y[token * width..][..width])
                };
                (0..tokens).flat_map(row).copied().collect()
            },
        );
    }
}

#[test]
fn a_layer_adds_to_what_is_there() {
    for [tokens, inputs, outputs] in [[1, 3, 5], [6, 64, 36], [70, 33, 96]] {
        let (layer, weight) = layer([outputs, inputs], 1);
        let tensors = [
            Input::random([tokens, inputs], 4),
            Input::random([RANK, inputs], 5),
            Input::random([outputs, RANK], 6),
            Input::random([tokens, outputs], 7),
        ];
        check(
            &format!("{tokens} tokens of {inputs}"),
            &tensors,
            |t| {
                let layers = vec![(&layer, Some(update(&t[1], &t[2])))];
                FrozenLinear::products(layers, &t[0], Some(&t[3])).remove(0)
            },
            |values| {
                let y = sum(&values[3], &product(&values[0], &weight, inputs), 1.0);
                sum(&y, &product(&product(&values[0], &values[1], inputs), &values[2], RANK), SCALE)
            },
        );
    }
}

/// What nobody makes anything of has no gradient, and takes none from the others.
#[test]
fn results_that_nobody_reads_give_nothing_back() {
    const TOKENS: usize = 5;
    const INPUTS: usize = 12;
    let layers = [1, 2, 3].map(|i| layer([WIDTHS[i - 1], INPUTS], i as u64));
    for (name, device) in all_devices() {
        let x = Input::random([TOKENS, INPUTS], 4).on(&device).tracked();
        let factor = |shape, seed| Input::random(shape, seed).on(&device).tracked();
        let [a, b] = [factor([RANK, INPUTS], 5), factor([WIDTHS[0], RANK], 6)];
        let updates = [Some(update(&a, &b)), None, None];
        let all = layers.iter().map(|(layer, _)| layer).zip(updates).collect();
        let results = FrozenLinear::products(all, &x, None);
        let dy = Input::random([TOKENS, WIDTHS[1]], 7);
        let gradients = pull_back(&results[1], dy.on(&device));
        let (_, weight) = &layers[1];
        let turned: Vec<f64> =
            (0..INPUTS).flat_map(|col| weight[col..].iter().step_by(INPUTS)).copied().collect();
        let found = host(&x.grad(&gradients).expect("a gradient at the input"));
        assert_close(&name, &found, &product(&dy.values, &turned, WIDTHS[1]));
        assert!(a.grad(&gradients).is_none() && b.grad(&gradients).is_none(), "{name}");
    }
}
