//! The products of a gated feed-forward as one operation, where this processor has it.

use burn::tensor::Tensor;
use pronk_kernels::{Activation, FrozenLinear, Precision, Tracked, computes_on_host, glu, pull_back};

use crate::reference::{Input, assert_within, devices, frozen_layer, host};

/// The results are those of products in bf16, the gradients as near as what is kept in bf16 lets them be.
#[test]
fn gated_products_are_products_gated() {
    const SHAPE: [usize; 2] = [70, 33];
    for (name, device) in devices().into_iter().filter(|(_, device)| computes_on_host(device)) {
        for (tokens, activation) in [(6, Activation::Silu), (67, Activation::GeluTanh)] {
            let layers = [1, 2].map(|seed| frozen_layer(SHAPE, Precision::Bf16, seed).0);
            let layers = layers.each_ref();
            let x = Input::random([tokens, SHAPE[1]], 3).on(&device);
            let dy = Input::random([tokens, SHAPE[0]], 4).on(&device);
            let one = |x: &Tensor<2>| FrozenLinear::gated(layers, x, activation);
            let apart = |x: &Tensor<2>| {
                glu(layers[0].product(x.clone()), layers[1].product(x.clone()), activation, Precision::F32)
            };
            let Some(y) = one(&x) else {
                assert_eq!(Precision::fastest(), Precision::F32, "{name}: no operation");
                continue;
            };
            let what = format!("{name}, {tokens} tokens, {activation:?}");
            assert_within(&what, &host(&y), &host(&apart(&x)), 1e-6);
            let gradient = |f: &dyn Fn(&Tensor<2>) -> Tensor<2>| {
                let leaf = x.clone().tracked();
                let gradients = pull_back(&f(&leaf), dy.clone());
                host(&leaf.grad(&gradients).expect("a gradient at the input"))
            };
            let found = gradient(&|x| one(x).expect("as before"));
            assert_within(&format!("{what}, gradient"), &found, &gradient(&apart), 1e-2);
        }
    }
}

/// In float32, with a few tokens, and between matrices that do not fit, there is none.
#[test]
fn other_products_are_left_to_others() {
    for (_, device) in devices() {
        let x = |tokens| Input::random([tokens, 33], 3).on(&device);
        let none = |shapes: [[usize; 2]; 2], precision, tokens| {
            let layers = shapes.map(|shape| frozen_layer(shape, precision, 1).0);
            FrozenLinear::gated(layers.each_ref(), &x(tokens), Activation::Silu).is_none()
        };
        assert!(none([[70, 33]; 2], Precision::F32, 67));
        assert!(none([[70, 33]; 2], Precision::Bf16, 1));
        assert!(none([[70, 33], [64, 33]], Precision::Bf16, 67));
        assert!(none([[70, 34]; 2], Precision::Bf16, 67));
    }
}

/// What is gated stays the same, its gradients as near as bf16 is: of tensors that others hold and of such that nobody does,
/// smaller than a turn and of several tasks.
#[test]
fn gates_can_be_kept_in_bf16() {
    for (name, device) in devices() {
        for (shape, activation) in [([1, 3], Activation::Silu), ([41, 1237], Activation::GeluTanh)] {
            let what = format!("{name}, {shape:?}, {activation:?}");
            let dy = Input::random(shape, 4).on(&device);
            let run = |kept, held: bool| {
                let leaves = [1, 2].map(|seed| Input::random(shape, seed).scaled(5.0).on(&device).tracked());
                let [gate, up] =
                    leaves.each_ref().map(|leaf| if held { leaf.clone() } else { leaf.clone() * 1.0 });
                let y = glu(gate, up, activation, kept);
                let found = pull_back(&y, dy.clone());
                (host(&y), leaves.map(|leaf| host(&leaf.grad(&found).expect("a gradient at every leaf"))))
            };
            let (y, gradients) = run(Precision::F32, true);
            for held in [true, false] {
                let (found, found_gradients) = run(Precision::Bf16, held);
                assert_eq!(found, y, "{what}");
                for (found, expected) in found_gradients.iter().zip(&gradients) {
                    assert_within(&what, found, expected, 1e-2);
                }
            }
        }
    }
}
