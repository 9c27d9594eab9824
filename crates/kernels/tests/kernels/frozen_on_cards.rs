//! Frozen matrices in the memory of a card, on CubeCL's CPU runtime: products and rows against
//! float64 loops over the numbers that the format holds.

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use pronk_kernels::{
    FrozenLinear, FrozenMatrix, LossGradients, Precision, Tracked, cross_entropy, open_device, pull_back,
};

use crate::frozen_products::{matrices, narrow, product, spelled_out};
use crate::reference::{assert_close, host, numbers};

/// A card where there is one, and CubeCL's CPU runtime elsewhere.
fn card() -> Device {
    open_device("cuda").or_else(|_| open_device("cube-cpu")).unwrap()
}

fn name(w: &FrozenMatrix) -> String {
    let [rows, cols] = w.shape();
    format!("{} [{rows}, {cols}]", w.format())
}

fn on(values: &[f64], width: usize) -> Tensor<2> {
    Tensor::from_data(TensorData::new(narrow(values), [values.len() / width, width]), &card())
}

/// Sent there once, as a resident base is. One token of the wide ones: this runtime takes seconds for a
/// product of more than a few tiles.
#[test]
fn every_format_multiplies_both_ways_on_a_card() {
    let few = |w: &FrozenMatrix| [[1, 1], [7, 33]].contains(&w.shape()) || w.shape()[0] == 66;
    for w in matrices().into_iter().filter(few) {
        let [rows, cols] = w.shape();
        let exact = spelled_out(&w);
        let what = name(&w);
        let linear = FrozenLinear::on_host(Arc::new(w), Precision::Bf16, None).on_device(&card());
        assert_eq!((linear.in_features(), linear.out_features()), (cols, rows));
        for tokens in if rows < 66 { vec![1, 5] } else { vec![1] } {
            let (x, dy) = (numbers(tokens * cols, 1), numbers(tokens * rows, 2));
            let y = product(&x, &exact, [tokens, rows, cols], (1, cols));
            let dx = product(&dy, &exact, [tokens, cols, rows], (cols, 1));
            let what = format!("{tokens} tokens through {what}");
            let tracked = on(&x, cols).tracked();
            let found = linear.forward(tracked.clone());
            assert_close(&format!("{what}, forward"), &host(&found.clone().inner()), &y);
            let mut gradients = pull_back(&found, on(&dy, rows));
            let gradient = tracked.grad_remove(&mut gradients).unwrap();
            assert_close(&format!("{what}, gradient"), &host(&gradient), &dx);
        }
    }
}

/// Sent there for each product.
#[test]
fn a_matrix_in_host_memory_multiplies_tensors_of_a_card() {
    for w in matrices().into_iter().filter(|w| w.shape() == [7, 33]).step_by(2) {
        let [rows, cols] = w.shape();
        let (exact, what) = (spelled_out(&w), name(&w));
        let linear = FrozenLinear::on_host(Arc::new(w), Precision::F32, None);
        // A transposed view: its numbers do not lie as its shape tells them.
        let x = numbers(6 * cols, 3);
        let view = on(&x, cols).transpose().tracked().transpose();
        let y = product(&x, &exact, [6, rows, cols], (1, cols));
        assert_close(&what, &host(&linear.forward(view).inner()), &y);
        let dy = numbers(6 * rows, 4);
        let dx = product(&dy, &exact, [6, cols, rows], (cols, 1));
        assert_close(&what, &host(&linear.backward(on(&dy, rows))), &dx);
        assert!(host(&linear.forward(Tensor::zeros([0, cols], &card()))).is_empty());
        assert!(host(&linear.backward(Tensor::zeros([0, rows], &card()))).is_empty());
    }
}

/// Rows come back as the host dequantizes them, but for the last bit where products and sums are fused.
#[test]
fn rows_of_a_card_are_those_of_the_host() {
    for w in matrices() {
        let rows = w.shape()[0] as u32;
        let ids: Vec<u32> = (0..rows).rev().chain([0, rows / 2]).collect();
        let expected: Vec<f64> = w.select(&ids).iter::<f64>().collect();
        let what = format!("rows of {}", name(&w));
        let linear = FrozenLinear::on_host(Arc::new(w), Precision::Bf16, None).on_device(&card());
        let found = host(&linear.rows(&ids, &card()));
        assert_eq!(found.len(), expected.len(), "{what}");
        let top = expected.iter().fold(0.0, |top: f64, x| top.max(x.abs()));
        for (a, b) in found.iter().zip(&expected) {
            assert!((a - b).abs() <= 2e-7 * top, "{what}: {a}, expected {b}");
        }
        let none: [u32; 0] = [];
        assert!(host(&linear.rows(&none, &card())).is_empty());
    }
}

/// Logits, their gradient and the targets' rows, through a head that stays quantized.
#[test]
fn cross_entropy_through_a_head_on_a_card_is_the_hosts() {
    let w = Arc::new(matrices().into_iter().rfind(|w| w.shape() == [7, 33]).unwrap());
    let hidden = numbers(4 * 33, 5);
    let targets = [6, 0, 3, 3];
    let on_host = FrozenLinear::on_host(w, Precision::F32, None);
    let x = Tensor::from_data(TensorData::new(narrow(&hidden), [4, 33]), &open_device("cpu").unwrap());
    let expected = cross_entropy(&x, &on_host, &targets, None, LossGradients::Hidden);
    let found =
        cross_entropy(&on(&hidden, 33), &on_host.on_device(&card()), &targets, None, LossGradients::Hidden);
    assert_close("loss", &host(&found.sum), &host(&expected.sum));
    assert_close("gradient", &host(&found.gradient.unwrap()), &host(&expected.gradient.unwrap()));
}
