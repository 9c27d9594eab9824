use burn::tensor::Tensor;
use pronk_kernels::{Tracked, pull_back, residual};

use crate::reference::{Input, all_devices, assert_close, check, host};

#[test]
fn a_sum_and_its_gradients() {
    for shape in [[1, 1], [7, 13], [129, 3]] {
        check(
            &format!("{shape:?}"),
            &[Input::random(shape, 1), Input::random(shape, 2)],
            |t| residual(t[0].clone(), t[1].clone()),
            |values| values[0].iter().zip(&values[1]).map(|(x, y)| x + y).collect(),
        );
    }
}

/// Tensors that several tasks sum, one of them with itself.
#[test]
fn large_values_are_summed_by_all_cores() {
    const SHAPE: [usize; 2] = [301, 257];
    for (name, device) in all_devices() {
        let x = Input::random(SHAPE, 1);
        let leaf = x.on(&device).tracked();
        let y = residual(residual(leaf.clone(), leaf.clone()), leaf.clone() * 5.0);
        let expected: Vec<f64> = x.values.iter().map(|x| 7.0 * x).collect();
        assert_close(&format!("sums on {name}"), &host(&y), &expected);
        let gradient = leaf.grad(&pull_back(&y, Tensor::ones(SHAPE, &device))).unwrap();
        assert!(host(&gradient).iter().all(|&x| x == 7.0), "{name}");
    }
}
