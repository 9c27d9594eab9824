use burn::tensor::Tensor;
use pronk_kernels::{RopeScaling, Rotary};

use crate::reference::{Input, assert_close, check};

const HEADS: usize = 3;
const DIM: usize = 10;
const THETA: f64 = 1000.0;
const POSITIONS: [u32; 7] = [0, 1, 2, 0, 1, 100, 301];
const LLAMA3: RopeScaling =
    RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 128.0 };

/// Radians a token of feature pair `i`, by wavelengths, as Llama 3's paper tells it.
fn frequency(i: usize, scaling: RopeScaling) -> f64 {
    let plain = 1.0 / THETA.powf(2.0 * i as f64 / DIM as f64);
    let wavelength = std::f64::consts::TAU / plain;
    match scaling {
        RopeScaling::None => plain,
        RopeScaling::Linear { factor } => plain / factor,
        RopeScaling::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original_context } => {
            if wavelength < original_context / high {
                plain
            } else if wavelength > original_context / low {
                plain / factor
            } else {
                let smooth = (original_context / wavelength - low) / (high - low);
                plain * ((1.0 - smooth) / factor + smooth)
            }
        }
    }
}

/// Every pair of features as a complex number, turned.
fn reference(x: &[f64], scaling: RopeScaling) -> Vec<f64> {
    let mut y = x.to_vec();
    for (token, position) in POSITIONS.into_iter().enumerate() {
        for head in 0..HEADS {
            for i in 0..DIM / 2 {
                let first = (token * HEADS + head) * DIM + i;
                let second = first + DIM / 2;
                let (sin, cos) = (f64::from(position) * frequency(i, scaling)).sin_cos();
                y[first] = x[first] * cos - x[second] * sin;
                y[second] = x[first] * sin + x[second] * cos;
            }
        }
    }
    y
}

#[test]
fn heads_are_turned_by_their_positions() {
    for scaling in [RopeScaling::None, RopeScaling::Linear { factor: 3.0 }, LLAMA3] {
        let input = Input::random([POSITIONS.len(), HEADS, DIM], 1);
        let operation = |x: &[Tensor<3>]| {
            let device = x[0].device().without_autodiff();
            Rotary::new(DIM, THETA, scaling).tables(&POSITIONS, &device).apply(x[0].clone())
        };
        check(&format!("{scaling:?}"), &[input], operation, |x| reference(&x[0], scaling));
    }
}

#[test]
fn factors_are_what_frequencies_are_divided_by() {
    let plain = (0..DIM / 2).map(|i| frequency(i, RopeScaling::None));
    let expected: Vec<f64> = plain.enumerate().map(|(i, f)| f / frequency(i, LLAMA3)).collect();
    assert_close("factors", &LLAMA3.factors(DIM, THETA), &expected);
    let between = |f: &f64| *f > 1.001 && *f < 7.999;
    assert!(expected[0] == 1.0 && expected.iter().any(between) && expected[4] == 8.0, "{expected:?}");
}
