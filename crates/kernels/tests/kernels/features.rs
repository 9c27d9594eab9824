//! The operations that take one token at a time.

use burn::tensor::Tensor;
use pronk_kernels::{Activation, FrozenLinear, Precision, glu, rms_norm, rms_norm_beside, soft_cap};

use crate::reference::{Input, assert_close, check, devices, dot, host};

#[test]
fn rms_norm_scales_by_the_root_mean_square() {
    for (tokens, hidden, eps) in [(7, 33, 1e-6), (7, 33, 0.01), (1, 64, 1e-5), (37, 6, 1e-5)] {
        let weight = Input::random([hidden], 2);
        let x = Input::random([tokens, hidden], 1).scaled(0.1);
        let reference = |x: &[Vec<f64>]| {
            let norm = |row: &[f64]| {
                let scale = (dot(row, row) / hidden as f64 + eps).sqrt();
                row.iter().zip(&weight.values).map(|(x, w)| x / scale * w).collect::<Vec<_>>()
            };
            x[0].chunks_exact(hidden).flat_map(norm).collect()
        };
        let operation = |x: &[Tensor<2>]| rms_norm(x[0].clone(), &weight.on(&x[0].device()), eps);
        let what = format!("rms_norm, {tokens} tokens of {hidden}, eps {eps}");
        check(&what, std::slice::from_ref(&x), operation, reference);

        let [stream, norm] = [3.0, 0.5];
        let beside = |x: &[Tensor<2>]| {
            let [x, y] = rms_norm_beside(x[0].clone(), &weight.on(&x[0].device()), eps);
            x * stream + y * norm
        };
        let both = |x: &[Vec<f64>]| {
            reference(x).into_iter().zip(&x[0]).map(|(y, x)| stream * x + norm * y).collect()
        };
        check(&format!("{what}, beside its input"), std::slice::from_ref(&x), beside, both);
        for read in [0, 1] {
            let operation = |x: &[Tensor<2>]| {
                rms_norm_beside(x[0].clone(), &weight.on(&x[0].device()), eps)[read].clone()
            };
            let reference = |x: &[Vec<f64>]| if read == 0 { x[0].clone() } else { reference(x) };
            check(&format!("{what}, result {read}"), std::slice::from_ref(&x), operation, reference);
        }
    }
}

#[test]
fn swiglu_gates() {
    // The widest gates are beyond where a float32 exponential ends.
    for (shape, widest) in [([5, 13], 20.0), ([1, 16], 1.0), ([3, 7], 200.0)] {
        let inputs = [Input::random(shape, 1).scaled(widest), Input::random(shape, 2)];
        let reference = |x: &[Vec<f64>]| {
            let gated = x[0].iter().zip(&x[1]).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up);
            gated.collect()
        };
        let operation = |x: &[Tensor<2>]| glu(x[0].clone(), x[1].clone(), Activation::Silu, Precision::F32);
        check(&format!("swiglu, gates to {widest}"), &inputs, operation, reference);
    }
}

#[test]
fn geglu_gates() {
    for (shape, widest) in [([5, 13], 6.0), ([1, 16], 1.0), ([3, 7], 200.0)] {
        let inputs = [Input::random(shape, 1).scaled(widest), Input::random(shape, 2)];
        let gelu = |x: f64| {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
        };
        let reference = |x: &[Vec<f64>]| x[0].iter().zip(&x[1]).map(|(gate, up)| gelu(*gate) * up).collect();
        let operation =
            |x: &[Tensor<2>]| glu(x[0].clone(), x[1].clone(), Activation::GeluTanh, Precision::F32);
        check(&format!("geglu, gates to {widest}"), &inputs, operation, reference);
    }
}

#[test]
fn a_soft_cap_keeps_logits_within_it() {
    for (shape, cap, widest) in [([5, 13], 30.0, 90.0), ([1, 16], 50.0, 1.0), ([3, 7], 0.5, 1e6)] {
        let x = Input::random(shape, 1).scaled(widest);
        let expected: Vec<f64> =
            x.values.iter().map(|x| f64::from(cap) * (x / f64::from(cap)).tanh()).collect();
        for (name, device) in devices() {
            let found = host(&soft_cap(x.on(&device), cap));
            assert_close(&format!("soft cap at {cap} on {name}"), &found, &expected);
        }
    }
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
