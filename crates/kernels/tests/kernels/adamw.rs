use std::path::Path;

use pronk_kernels::{AdamW, AdamWState};
use serde_json::Value;

use crate::reference::{Input, devices, host};

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

#[test]
fn steps_as_torch_does() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/optimizer.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let golden = &golden["adamw"];
    let [beta1, beta2] = floats(&golden["betas"])[..] else { panic!("two betas") };
    let number = |key: &str| golden[key].as_f64().unwrap();
    let adamw = AdamW { beta1, beta2, eps: number("eps"), weight_decay: number("weight_decay") };
    let tensor = |value: &Value| Input { values: floats(value), shape: [2, 3] };

    for (name, device) in devices() {
        let mut parameter = tensor(&golden["initial"]).on(&device);
        let mut state = AdamWState::zeros_like(&parameter);
        for (i, learning_rate) in floats(&golden["learning_rates"]).into_iter().enumerate() {
            let gradient = tensor(&golden["gradients"][i]).on(&device);
            parameter = adamw.step(parameter, gradient, &mut state, learning_rate, i as u64 + 1);
            let expected = floats(&golden["parameters"][i]);
            let errors = host(&parameter).into_iter().zip(expected).map(|(a, b)| (a / b - 1.0).abs());
            let error = errors.fold(0.0, f64::max);
            println!("adamw on {name}, step {}: relative error {error:.1e}", i + 1);
            assert!(error < 1e-6, "{name}: step {} is off by {error:e}", i + 1);
        }
    }
}

/// Moments may come from another optimizer's file: they are the state, and all of it.
#[test]
fn a_state_that_is_put_back_goes_on_alike() {
    let (_, device) = devices().swap_remove(0);
    let adamw = AdamW::default();
    let gradient = |seed| Input::random([5, 3], seed).on(&device);
    let start = gradient(0);
    let mut state = AdamWState::zeros_like(&start);
    let first = adamw.step(start, gradient(1), &mut state, 0.1, 1);
    let copy = |x: &burn::tensor::Tensor<2>| Input { values: host(x), shape: [5, 3] }.on(&device);
    let (again, mut put_back) = (copy(&first), AdamWState { m: copy(&state.m), v: copy(&state.v) });
    let a = adamw.step(first, gradient(2), &mut state, 0.1, 2);
    let b = adamw.step(again, gradient(2), &mut put_back, 0.1, 2);
    assert_eq!(host(&a), host(&b));
}
