//! Lion and Muon against their formulas in float64, matrices as lists of rows.

use burn::tensor::Tensor;
use pronk_kernels::{Lion, Muon};

use crate::reference::{Input, assert_close, devices, host};

type Rows = Vec<Vec<f64>>;

fn rows(values: &[f64], cols: usize) -> Rows {
    values.chunks(cols).map(<[f64]>::to_vec).collect()
}

fn product(x: &Rows, y: &Rows) -> Rows {
    x.iter()
        .map(|r| (0..y[0].len()).map(|j| r.iter().zip(y).map(|(a, b)| a * b[j]).sum()).collect())
        .collect()
}

fn transposed(x: &Rows) -> Rows {
    (0..x[0].len()).map(|j| x.iter().map(|r| r[j]).collect()).collect()
}

/// `p x + q y`
fn mixed(p: f64, x: &Rows, q: f64, y: &Rows) -> Rows {
    x.iter().zip(y).map(|(x, y)| x.iter().zip(y).map(|(x, y)| p * x + q * y).collect()).collect()
}

fn norm(x: &Rows) -> f64 {
    x.iter().flatten().map(|x| x * x).sum::<f64>().sqrt()
}

/// Three steps of `ours` and of `reference`, which takes parameter, gradient and momentum.
fn compare(
    name: &str,
    shape: [usize; 2],
    ours: impl Fn(Tensor<2>, Tensor<2>, &mut Tensor<2>) -> Tensor<2>,
    reference: impl Fn(Rows, &Rows, &mut Rows) -> Rows,
) {
    for (device_name, device) in devices() {
        let start = Input::random(shape, 1);
        let (mut found, mut expected) = (start.on(&device), rows(&start.values, shape[1]));
        let mut momentum = found.zeros_like();
        let mut reference_momentum = vec![vec![0.0; shape[1]]; shape[0]];
        for step in 0..3 {
            let gradient = Input::random(shape, 10 + step);
            found = ours(found, gradient.on(&device), &mut momentum);
            expected = reference(expected, &rows(&gradient.values, shape[1]), &mut reference_momentum);
            let what = format!("{name} {shape:?} on {device_name}, step {step}");
            assert_close(&what, &host(&found), &expected.concat());
            assert_close(&what, &host(&momentum), &reference_momentum.concat());
        }
    }
}

#[test]
fn lion_steps_by_the_sign_of_its_average() {
    let lion = Lion { beta1: 0.9, beta2: 0.99, weight_decay: 0.1 };
    let rate = 0.03;
    compare(
        "lion",
        [7, 5],
        |p, g, m| lion.step(p, g, m, rate),
        |parameter, gradient, momentum| {
            let update = mixed(0.9, momentum, 0.1, gradient);
            *momentum = mixed(0.99, momentum, 0.01, gradient);
            let sign = update.iter().map(|row| row.iter().map(|x| x.signum()).collect()).collect();
            mixed(1.0 - rate * 0.1, &parameter, -rate, &sign)
        },
    );
}

#[test]
fn muon_steps_by_its_momentum_made_orthogonal() {
    let muon = Muon { beta: 0.95, weight_decay: 0.1 };
    let rate = 0.02;
    for shape in [[4, 24], [24, 4], [6, 6]] {
        compare(
            "muon",
            shape,
            |p, g, m| muon.step(p, &g, m, rate),
            |parameter, gradient, momentum| {
                *momentum = mixed(0.95, momentum, 0.05, gradient);
                let ahead = mixed(0.05, gradient, 0.95, momentum);
                let tall = shape[0] > shape[1];
                let x = if tall { transposed(&ahead) } else { ahead };
                let length = norm(&x) + 1e-7;
                let mut x = mixed(1.0 / length, &x, 0.0, &x);
                for _ in 0..5 {
                    let square = product(&x, &transposed(&x));
                    let step = mixed(-4.775, &square, 2.0315, &product(&square, &square));
                    x = mixed(3.4445, &x, 1.0, &product(&step, &x));
                }
                let x = if tall { transposed(&x) } else { x };
                let scale = (shape[0] as f64 / shape[1] as f64).max(1.0).sqrt();
                mixed(1.0 - rate * 0.1, &parameter, -rate * scale, &x)
            },
        );
    }
}

/// What it is for: all singular values are near one, so the squared length is about their number.
#[test]
fn muons_step_is_nearly_orthogonal() {
    let (_, device) = devices().swap_remove(0);
    let shape = [4, 64];
    let gradient = Input::random(shape, 3).on(&device);
    let mut momentum = gradient.zeros_like();
    let muon = Muon::default();
    let moved = muon.step(gradient.zeros_like(), &gradient, &mut momentum, 1.0);
    let x = rows(&host(&moved), 64);
    let square = product(&x, &transposed(&x));
    for (i, row) in square.iter().enumerate() {
        for (j, &value) in row.iter().enumerate() {
            if i == j {
                assert!((0.4..1.5).contains(&value), "{value}");
            } else {
                assert!(value.abs() < 0.35, "{value}");
            }
        }
    }
}
