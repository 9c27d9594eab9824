//! Operations that are lent a tensor's numbers, against the same in burn's own operations: values,
//! gradients, and what in-place work and threads must never change.

use burn::tensor::{Device, Tensor};
use pronk_kernels::{
    Activation, Precision, RopeScaling, Rotary, RotaryTables, Scoring, Span, Tracked, attention, glu, plain,
    pull_back, rms_norm,
};

use crate::reference::{Input, assert_close, devices, host, numbers};

const HEADS: [usize; 3] = [6, 2, 10];

type Operation<'a, const D: usize> = &'a (dyn Fn(Vec<Tensor<D>>) -> Tensor<2> + Sync);

/// The result of `operation` where nothing is recorded, then that where everything is, then the
/// gradients.
fn run<const D: usize>(operation: Operation<D>, inputs: &[Input<D>], device: &Device) -> Vec<Vec<f64>> {
    let plain = || inputs.iter().map(|input| input.on(device));
    let result = operation(plain().collect());
    let leaves: Vec<_> = plain().map(Tracked::tracked).collect();
    let recorded = operation(leaves.clone());
    let weights = Input { values: numbers(recorded.shape().num_elements(), 99), shape: recorded.dims() };
    let gradients = pull_back(&recorded, weights.on(device));
    let gradients = leaves.iter().map(|leaf| host(&leaf.grad(&gradients).unwrap()));
    let mut all = vec![host(&result), host(&recorded)];
    all.extend(gradients);
    // What is held elsewhere stays as it is.
    for (leaf, input) in leaves.iter().zip(inputs) {
        assert_eq!(host(leaf), input.values);
    }
    all
}

fn agree<const D: usize>(what: &str, inputs: &[Input<D>], operation: Operation<D>, plain: Operation<D>) {
    for (name, device) in devices() {
        let what = format!("{what} on {name}");
        let found = run(operation, inputs, &device);
        for (found, expected) in found.iter().zip(run(plain, inputs, &device)) {
            assert_close(&what, found, &expected);
        }
        assert_eq!(found[0], found[1], "{what}: the same bits, recorded or not");
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_eq!(found, pool.install(|| run(operation, inputs, &device)), "{what}, {threads} threads");
        }
        let held: Vec<_> = inputs.iter().map(|input| input.on(&device)).collect();
        assert_eq!(found[0], host(&operation(held.clone())), "{what}, inputs held");
        for (held, input) in held.iter().zip(inputs) {
            assert_eq!(host(held), input.values, "{what}: inputs held stay as they are");
        }
        // Views of other tensors, in another order of memory or with rows before and behind.
        let turned = held.iter().map(|x| x.clone().swap_dims(0, D - 1).add_scalar(0.0).swap_dims(0, D - 1));
        assert_eq!(found[0], host(&operation(turned.collect())), "{what}, transposed");
        let padded = held.iter().map(|x| {
            let rows = x.dims()[0];
            Tensor::cat(vec![x.clone(), x.clone(), x.clone()], 0).narrow(0, rows, rows)
        });
        assert_eq!(found[0], host(&operation(padded.collect())), "{what}, narrowed");
    }
}

#[test]
fn norms() {
    for shape in [[61, 577], [1, 16], [16, 48]] {
        let weight = Input::random([shape[1]], 2);
        let norm = |x: Vec<Tensor<2>>, f: fn(Tensor<2>, &Tensor<1>, f64) -> Tensor<2>| {
            f(x[0].clone(), &weight.on(&x[0].device()), 1e-5)
        };
        let input = Input::random(shape, 1);
        agree("rms_norm", &[input], &|x| norm(x, rms_norm), &|x| norm(x, plain::rms_norm));
    }
}

#[test]
fn gates() {
    let activations = [Activation::Silu, Activation::GeluTanh];
    for (shape, activation) in [[41, 1237], [1, 3]].into_iter().flat_map(|s| activations.map(|a| (s, a))) {
        let inputs = [Input::random(shape, 1).scaled(10.0), Input::random(shape, 2)];
        let two = |x: Vec<Tensor<2>>| <[Tensor<2>; 2]>::try_from(x).unwrap();
        agree(
            &format!("{activation:?} gates"),
            &inputs,
            &|x| {
                let [gate, up] = two(x);
                glu(gate, up, activation, Precision::F32)
            },
            &|x| {
                let [gate, up] = two(x);
                plain::glu(gate, up, activation)
            },
        );
    }
}

#[test]
fn turns() {
    let [heads, _, dim] = HEADS;
    for tokens in [1, 53] {
        let positions: Vec<u32> = (0..tokens as u32).map(|i| i * 7 % 31).collect();
        let turned = |mut x: Vec<Tensor<3>>, f: fn(&RotaryTables, Tensor<3>) -> Tensor<3>| {
            let x = x.remove(0);
            let device = x.device().without_autodiff();
            let tables = Rotary::new(dim, 1000.0, RopeScaling::None).tables(&positions, &device);
            f(&tables, x).reshape([tokens, heads * dim])
        };
        let input = Input::random([tokens, heads, dim], 1);
        agree("rotary", &[input], &|x| turned(x, RotaryTables::apply), &|x| {
            turned(x, |tables, x| plain::rotary(x, tables))
        });
    }
}

#[test]
fn attentions() {
    let [heads, kv_heads, dim] = HEADS;
    let documents = [0..3, 3..4, 4..150].map(Span::document).to_vec();
    let cache = vec![Span { queries: 0..45, keys: 0..70 }];
    let plain_scores = Scoring::of_heads(dim);
    let all_at_once = Scoring { scale: 0.4, soft_cap: Some(2.0), window: Some(33), ..Scoring::of_heads(1) };
    for (spans, scoring) in [documents, cache]
        .into_iter()
        .flat_map(|s| [plain_scores, all_at_once].map(|scoring| (s.clone(), scoring)))
    {
        let (queries, keys) = spans.last().map(|span| (span.queries.end, span.keys.end)).unwrap();
        let inputs = [
            Input::random([queries, heads, dim], 1).scaled(3.0),
            Input::random([keys, kv_heads, dim], 2).scaled(3.0),
            Input::random([keys, kv_heads, dim], 3),
        ];
        let three = |x: Vec<Tensor<3>>| <[Tensor<3>; 3]>::try_from(x).unwrap();
        agree(
            &format!("attention, {scoring:?}"),
            &inputs,
            &|x| {
                let [q, k, v] = three(x);
                attention(q, &k, &v, &spans, scoring)
            },
            &|x| {
                let [q, k, v] = three(x);
                plain::attention(&q, &k, &v, &spans, scoring)
            },
        );
    }
}
