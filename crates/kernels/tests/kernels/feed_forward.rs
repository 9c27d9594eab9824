//! A gated feed-forward as one operation, where this processor has it, and what is kept of gates by themselves.

use burn::tensor::Tensor;
use pronk_kernels::{Activation, FrozenLinear, Precision, Tracked, computes_on_host, glu, pull_back};

use crate::reference::{Input, assert_within, devices, frozen_layer, host};

const INNER: usize = 70;
const HIDDEN: usize = 33;

fn layers(precision: Precision) -> [FrozenLinear; 3] {
    let layer = |shape, seed| frozen_layer(shape, precision, seed).0;
    [layer([INNER, HIDDEN], 1), layer([INNER, HIDDEN], 2), layer([HIDDEN, INNER], 3)]
}

/// The results are those of products in bf16, the gradients as near as what is kept in bf16 lets them be; those of what
/// nobody reads are the same.
#[test]
fn a_feed_forward_is_products_gated() {
    for (name, device) in devices().into_iter().filter(|(_, device)| computes_on_host(device)) {
        for (tokens, activation, added) in [(6, Activation::Silu, true), (67, Activation::GeluTanh, false)] {
            let layers = layers(Precision::Bf16);
            let [gate, up, down] = layers.each_ref();
            let inputs = [4, 5].map(|seed| Input::random([tokens, HIDDEN], seed).on(&device));
            let dy = Input::random([tokens, HIDDEN], 6).on(&device);
            let one = |[x, stream]: [&Tensor<2>; 2], read| {
                FrozenLinear::feed_forward([gate, up, down], x, added.then_some(stream), activation, read)
            };
            let apart = |[x, stream]: [&Tensor<2>; 2]| {
                let [gate, up] = [gate, up].map(|layer| layer.product(x.clone()));
                let y = down.product(glu(gate, up, activation, Precision::F32));
                if added { y + stream.clone() } else { y }
            };
            let Some(y) = one(inputs.each_ref(), true) else {
                assert_eq!(Precision::fastest(), Precision::F32, "{name}: no operation");
                continue;
            };
            let what = format!("{name}, {tokens} tokens, {activation:?}");
            assert_within(&what, &host(&y), &host(&apart(inputs.each_ref())), 1e-5);
            let gradients = |f: &dyn Fn([&Tensor<2>; 2]) -> Tensor<2>| {
                let leaves = inputs.clone().map(Tracked::tracked);
                let found = pull_back(&f(leaves.each_ref()), dy.clone());
                leaves.map(|leaf| leaf.grad(&found).map(|gradient| host(&gradient)))
            };
            let found = gradients(&|inputs| one(inputs, true).expect("as before"));
            assert_eq!(
                gradients(&|inputs| one(inputs, false).expect("as before")),
                found,
                "{what}, not read"
            );
            let expected = gradients(&apart);
            assert_eq!(found[1].is_some(), added, "{what}: a gradient at what is added to");
            for (found, expected) in found.iter().zip(&expected) {
                let (Some(found), Some(expected)) = (found, expected) else {
                    assert_eq!(found, expected, "{what}");
                    continue;
                };
                assert_within(&format!("{what}, gradient"), found, expected, 1e-2);
            }
        }
    }
}

/// In float32, with a few tokens, and between matrices that do not fit, there is none.
#[test]
fn other_products_are_left_to_others() {
    for (_, device) in devices() {
        let x = |tokens| Input::random([tokens, HIDDEN], 3).on(&device);
        let none = |[gate, up, down]: [&FrozenLinear; 3], tokens| {
            FrozenLinear::feed_forward([gate, up, down], &x(tokens), None, Activation::Silu, true).is_none()
        };
        let [gate, up, down] = layers(Precision::Bf16);
        assert!(none(layers(Precision::F32).each_ref(), 67));
        assert!(none([&gate, &up, &down], 1));
        assert!(none([&gate, &down, &up], 67));
        assert!(none([&gate, &up, &up], 67));
        assert!(none([&down, &down, &up], 67));
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
