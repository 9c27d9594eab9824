//! Devices, numbers, and the comparison of an operation with its float64 reference.

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use pronk_kernels::{Format, FrozenLinear, FrozenMatrix, Precision, Tracked, open_devices, pull_back};

/// Of the largest expected number.
pub const TOLERANCE: f64 = 1e-4;

/// Every device that this build has and this machine, with its name, or those whose names `PRONK_TEST_DEVICES` holds.
/// There is at least one.
pub fn devices() -> Vec<(String, Device)> {
    let mut devices = all_devices();
    devices.retain(|(name, _)| name != "cube-cpu");
    devices
}

/// The same with CubeCL's CPU runtime, for small shapes: there a product takes seconds.
pub fn all_devices() -> Vec<(String, Device)> {
    let mut devices = open_devices();
    if let Ok(wanted) = std::env::var("PRONK_TEST_DEVICES") {
        devices.retain(|(name, _)| wanted.split(',').any(|wanted| wanted == name));
    }
    assert!(!devices.is_empty(), "these tests need a CPU backend: --features flex, or tch");
    devices
}

/// `n` numbers within ±1, all float32, so that both sides compute from the same.
pub fn numbers(n: usize, seed: u64) -> Vec<f64> {
    let mut state = seed;
    let mut next = || {
        // SplitMix64
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        f64::from((((z ^ (z >> 31)) >> 40) as f32) / ((1u64 << 23) as f32) - 1.0)
    };
    (0..n).map(|_| next()).collect()
}

/// A tensor of a shape, still on the host.
#[derive(Clone)]
pub struct Input<const D: usize> {
    pub values: Vec<f64>,
    pub shape: [usize; D],
}

impl<const D: usize> Input<D> {
    pub fn random(shape: [usize; D], seed: u64) -> Self {
        Self { values: numbers(shape.iter().product(), seed), shape }
    }

    pub fn scaled(mut self, factor: f32) -> Self {
        self.values.iter_mut().for_each(|x| *x = f64::from(*x as f32 * factor));
        self
    }

    pub fn on(&self, device: &Device) -> Tensor<D> {
        let values: Vec<f32> = self.values.iter().map(|&x| x as f32).collect();
        Tensor::from_data(TensorData::new(values, self.shape), device)
    }
}

pub fn host<const D: usize>(tensor: &Tensor<D>) -> Vec<f64> {
    tensor.try_to_vec_as::<f32>().unwrap().into_iter().map(f64::from).collect()
}

pub fn assert_close(what: &str, found: &[f64], expected: &[f64]) {
    assert_within(what, found, expected, TOLERANCE);
}

/// `tolerance` is of the largest expected number.
pub fn assert_within(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    assert!(found.iter().all(|x| x.is_finite()), "{what}: not all numbers are finite");
    let difference = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    let error = difference / expected.iter().fold(1e-30, |top: f64, x| top.max(x.abs()));
    println!("{what}: relative error {error:.1e}");
    assert!(error <= tolerance, "{what}: relative error {error:e}, allowed are {tolerance:e}");
}

/// The gradient of `f` at `x` by central differences; in float64 good to nine digits.
pub fn slopes(f: impl Fn(&[f64]) -> f64, x: &[f64]) -> Vec<f64> {
    const STEP: f64 = 1e-5;
    let mut moved = x.to_vec();
    let mut at = |i: usize, value: f64| {
        moved[i] = value;
        let y = f(&moved);
        moved[i] = x[i];
        y
    };
    let slope = |(i, &xi): (usize, &f64)| (at(i, xi + STEP) - at(i, xi - STEP)) / (2.0 * STEP);
    x.iter().enumerate().map(slope).collect()
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `a b^T`, with rows of `width`.
pub fn times_transposed(a: &[f64], b: &[f64], width: usize) -> Vec<f64> {
    a.chunks_exact(width).flat_map(|a| b.chunks_exact(width).map(move |b| dot(a, b))).collect()
}

/// A frozen layer whose weight is kept in float32, and that.
pub fn frozen_layer([rows, cols]: [usize; 2], precision: Precision, seed: u64) -> (FrozenLinear, Vec<f64>) {
    let weight = numbers(rows * cols, seed);
    let bytes: Vec<u8> = weight.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect();
    let matrix = FrozenMatrix::dense(Format::F32, [rows, cols], bytes.into()).unwrap();
    (FrozenLinear::on_host(Arc::new(matrix), precision, None), weight)
}

/// Compares `operation` with `reference` on every device: its result on plain tensors, and the
/// gradient at each of `inputs` of the result's inner product with random weights.
pub fn check<const D: usize, const E: usize>(
    what: &str,
    inputs: &[Input<D>],
    operation: impl Fn(&[Tensor<D>]) -> Tensor<E>,
    reference: impl Fn(&[Vec<f64>]) -> Vec<f64>,
) {
    let values: Vec<Vec<f64>> = inputs.iter().map(|input| input.values.clone()).collect();
    let expected = reference(&values);
    let weights = numbers(expected.len(), 99);
    let gradient_at = |i: usize| {
        let loss = |x: &[f64]| {
            let mut values = values.clone();
            values[i] = x.to_vec();
            dot(&reference(&values), &weights)
        };
        slopes(loss, &values[i])
    };
    let gradients: Vec<Vec<f64>> = (0..inputs.len()).map(gradient_at).collect();

    for (name, device) in all_devices() {
        let plain: Vec<Tensor<D>> = inputs.iter().map(|input| input.on(&device)).collect();
        let result = operation(&plain);
        assert_close(&format!("{what} on {name}"), &host(&result), &expected);

        let leaves: Vec<Tensor<D>> = plain.into_iter().map(Tracked::tracked).collect();
        let output = operation(&leaves);
        let weights = Input { values: weights.clone(), shape: output.dims() }.on(&device);
        let found = pull_back(&output, weights);
        for (i, (leaf, expected)) in leaves.iter().zip(&gradients).enumerate() {
            let gradient = leaf.grad(&found).expect("a gradient at every leaf");
            assert_close(&format!("{what} on {name}, gradient {i}"), &host(&gradient), expected);
        }
    }
}
