use burn::tensor::Tensor;
use pronk_kernels::{Tracked, fan_out, pull_back, residual};

use crate::reference::{Input, all_devices, assert_close, check, host};

/// More numbers than a task takes.
const SHAPES: [[usize; 2]; 3] = [[1, 1], [7, 13], [129, 3]];

#[test]
fn a_sum_and_its_gradients() {
    for shape in SHAPES {
        check(
            &format!("{shape:?}"),
            &[Input::random(shape, 1), Input::random(shape, 2)],
            |t| residual(t[0].clone(), t[1].clone()),
            |values| values[0].iter().zip(&values[1]).map(|(x, y)| x + y).collect(),
        );
    }
}

/// Readers that make different things of it, one of them a sum with itself.
#[test]
fn the_gradients_of_all_readers_are_summed() {
    for shape in SHAPES {
        check(
            &format!("{shape:?}"),
            &[Input::random(shape, 1)],
            |t| {
                let [a, b, c] = fan_out(t[0].clone());
                residual(a * 3.0, residual(b.clone() * b, c))
            },
            |values| values[0].iter().map(|x| 3.0 * x + x * x + x).collect(),
        );
    }
}

/// Tensors that several tasks sum, and readers of readers.
#[test]
fn large_values_are_summed_by_all_cores() {
    const SHAPE: [usize; 2] = [301, 257];
    for (name, device) in all_devices() {
        let x = Input::random(SHAPE, 1);
        let leaf = x.on(&device).tracked();
        let [a, b] = fan_out(leaf.clone());
        let [c, d, e] = fan_out(a);
        let y = residual(residual(b * 2.0, c * 3.0), residual(d, e * 5.0));
        let expected: Vec<f64> = x.values.iter().map(|x| 11.0 * x).collect();
        assert_close(&format!("sums on {name}"), &host(&y), &expected);
        let gradient = leaf.grad(&pull_back(&y, Tensor::ones(SHAPE, &device))).unwrap();
        assert!(host(&gradient).iter().all(|&x| x == 11.0), "{name}");
    }
}
