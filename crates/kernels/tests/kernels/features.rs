//! The operations that take one token at a time.

use burn::tensor::Tensor;
use pronk_kernels::{FrozenLinear, rms_norm, swiglu};

use crate::reference::{Input, check, devices, dot, host};

#[test]
fn rms_norm_scales_by_the_root_mean_square() {
    const HIDDEN: usize = 33;
    let weight = Input::random([HIDDEN], 2);
    let x = Input::random([7, HIDDEN], 1).scaled(0.1);
    for eps in [1e-6, 0.01] {
        let reference = |x: &[Vec<f64>]| {
            let norm = |row: &[f64]| {
                let scale = (dot(row, row) / HIDDEN as f64 + eps).sqrt();
                row.iter().zip(&weight.values).map(|(x, w)| x / scale * w).collect::<Vec<_>>()
            };
            x[0].chunks_exact(HIDDEN).flat_map(norm).collect()
        };
        let operation = |x: &[Tensor<2>]| rms_norm(x[0].clone(), &weight.on(&x[0].device()), eps);
        check(&format!("rms_norm, eps {eps}"), std::slice::from_ref(&x), operation, reference);
    }
}

#[test]
fn swiglu_gates() {
    let inputs = [Input::random([5, 13], 1).scaled(20.0), Input::random([5, 13], 2)];
    let reference = |x: &[Vec<f64>]| {
        let gated = x[0].iter().zip(&x[1]).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up);
        gated.collect()
    };
    check("swiglu", &inputs, |x: &[Tensor<2>]| swiglu(x[0].clone(), x[1].clone()), reference);
}

#[test]
fn a_frozen_linear_multiplies_by_the_transpose() {
    const IN: usize = 19;
    const OUT: usize = 11;
    let x = Input::random([7, IN], 1);
    let weight = Input::random([OUT, IN], 2);
    let bias = Input::random([OUT], 3);
    for with_bias in [false, true] {
        let reference = |x: &[Vec<f64>]| {
            let row = |x: &[f64]| {
                let dots = weight.values.chunks_exact(IN).map(|w| dot(x, w));
                let bias = bias.values.iter().map(|b| if with_bias { *b } else { 0.0 });
                dots.zip(bias).map(|(y, b)| y + b).collect::<Vec<_>>()
            };
            x[0].chunks_exact(IN).flat_map(row).collect()
        };
        let operation = |x: &[Tensor<2>]| {
            let device = x[0].device();
            let bias = with_bias.then(|| bias.on(&device));
            FrozenLinear::new(weight.on(&device), bias).forward(x[0].clone())
        };
        check(&format!("linear, bias {with_bias}"), std::slice::from_ref(&x), operation, reference);
    }
    for (_, device) in devices() {
        let linear = FrozenLinear::new(weight.on(&device), None);
        assert_eq!((linear.in_features(), linear.out_features()), (IN, OUT));
        let all: Vec<u32> = (0..OUT as u32).collect();
        assert_eq!(host(&linear.rows(&all, &device)), weight.values);
    }
}
