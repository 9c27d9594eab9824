//! Every operation on the shapes of SmolLM2-135M and Llama-2-7B, with its floor beside it: what the same bytes take
//! to be copied, or the rate of the largest product. Bytes count what has to be read and written once, items are
//! floating-point operations. `scripts/bench-kernels` makes a table of them.
//!
//!     cargo bench --package pronk-kernels --features flex

#![allow(clippy::wildcard_imports)] // every module is a part of this file
#![allow(clippy::unwrap_used)] // a benchmark reports by panicking

use std::fmt;
use std::sync::Arc;

use burn::tensor::{Device, Distribution, Tensor};
use bytes::Bytes;
use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use pronk_kernels::{
    Format, FrozenLinear, FrozenMatrix, LossGradients, Precision, Scoring, Span, Tracked, pull_back,
    quantize_nf4,
};

/// Tokens of a micro-batch: eight records of Alpaca.
const TOKENS: usize = 1024;
/// Tokens of a record.
const RECORD: usize = 128;
/// Sizes of a decoder.
const SMALL: Shape = Shape { name: "SmolLM2-135M", hidden: 576, inner: 1536, heads: 9, kv_heads: 3, dim: 64 };
const LARGE: Shape =
    Shape { name: "Llama-2-7B", hidden: 4096, inner: 11008, heads: 32, kv_heads: 32, dim: 128 };

#[derive(Clone, Copy)]
struct Shape {
    name: &'static str,
    hidden: usize,
    inner: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name)
    }
}

// As the program does.
#[global_allocator]
static HEAP: pronk_kernels::Heap = pronk_kernels::Heap;

fn main() {
    pronk_kernels::keep_freed_memory();
    pronk_kernels::compute_on_this_thread();
    divan::main();
}

fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::random(shape, Distribution::Uniform(-1.0, 1.0), &Device::flex())
}

fn bytes_of(numbers: usize) -> BytesCount {
    BytesCount::new(numbers * size_of::<f32>())
}

/// The floor of what only reads and writes: numbers, copied, as many bytes a second.
fn copy(bencher: Bencher, numbers: usize) {
    let (from, mut to) = (vec![1.0_f32; numbers / 2], vec![0.0_f32; numbers / 2]);
    bencher.counter(bytes_of(numbers)).bench_local(|| divan::black_box(&mut to).copy_from_slice(&from));
}

mod rms_norm {
    use super::*;

    #[divan::bench(args = [SMALL, LARGE])]
    fn forward(bencher: Bencher, shape: Shape) {
        let (x, weight) = (random([TOKENS, shape.hidden]), random([shape.hidden]));
        let norm = || pronk_kernels::rms_norm(x.clone(), &weight, 1e-5);
        bencher.counter(bytes_of(2 * TOKENS * shape.hidden)).bench_local(norm);
    }

    /// Forwards and backwards, as everywhere below.
    #[divan::bench(args = [SMALL, LARGE])]
    fn gradient(bencher: Bencher, shape: Shape) {
        let (x, weight) = (random([TOKENS, shape.hidden]), random([shape.hidden]));
        let dy: Tensor<2> = random([TOKENS, shape.hidden]);
        let norm = || pronk_kernels::rms_norm(x.clone().tracked(), &weight, 1e-5);
        bencher.counter(bytes_of(5 * TOKENS * shape.hidden)).bench_local(|| pull_back(&norm(), dy.clone()));
    }

    #[divan::bench(args = [SMALL, LARGE])]
    fn floor(bencher: Bencher, shape: Shape) {
        copy(bencher, 2 * TOKENS * shape.hidden);
    }
}

mod glu {
    use super::*;
    use pronk_kernels::Activation;

    #[divan::bench(args = [SMALL, LARGE])]
    fn forward(bencher: Bencher, shape: Shape) {
        let [gate, up] = [random([TOKENS, shape.inner]), random([TOKENS, shape.inner])];
        let glu = || pronk_kernels::glu(gate.clone(), up.clone(), Activation::Silu, Precision::F32);
        bencher.counter(bytes_of(3 * TOKENS * shape.inner)).bench_local(glu);
    }

    #[divan::bench(args = [SMALL, LARGE])]
    fn gradient(bencher: Bencher, shape: Shape) {
        let [gate, up, dy] = [(); 3].map(|()| random([TOKENS, shape.inner]));
        let glu = || {
            pronk_kernels::glu(gate.clone().tracked(), up.clone().tracked(), Activation::Silu, Precision::F32)
        };
        bencher.counter(bytes_of(8 * TOKENS * shape.inner)).bench_local(|| pull_back(&glu(), dy.clone()));
    }

    #[divan::bench(args = [SMALL, LARGE])]
    fn floor(bencher: Bencher, shape: Shape) {
        copy(bencher, 3 * TOKENS * shape.inner);
    }
}

mod add_low_rank {
    use super::*;

    const RANK: usize = 8;

    #[divan::bench(args = [SMALL, LARGE])]
    fn forward(bencher: Bencher, shape: Shape) {
        let [y, x] = [random([TOKENS, shape.hidden]), random([TOKENS, shape.hidden])];
        let (a, b) = (random([RANK, shape.hidden]), random([shape.hidden, RANK]));
        let add = || pronk_kernels::add_low_rank(y.clone(), x.clone(), &a, &b, 2.0);
        bencher.counter(bytes_of(3 * TOKENS * shape.hidden)).bench_local(add);
    }

    #[divan::bench(args = [SMALL, LARGE])]
    fn gradient(bencher: Bencher, shape: Shape) {
        let [y, x, dy] = [(); 3].map(|()| random([TOKENS, shape.hidden]));
        let (a, b) = (random([RANK, shape.hidden]), random([shape.hidden, RANK]));
        let add = || {
            let (a, b) = (a.clone().tracked(), b.clone().tracked());
            pronk_kernels::add_low_rank(y.clone(), x.clone().tracked(), &a, &b, 2.0)
        };
        bencher.counter(bytes_of(6 * TOKENS * shape.hidden)).bench_local(|| pull_back(&add(), dy.clone()));
    }

    #[divan::bench(args = [SMALL, LARGE])]
    fn floor(bencher: Bencher, shape: Shape) {
        copy(bencher, 3 * TOKENS * shape.hidden);
    }
}

mod rotary {
    use super::*;
    use pronk_kernels::{RopeScaling, Rotary};

    #[divan::bench(args = [SMALL, LARGE])]
    fn forward(bencher: Bencher, shape: Shape) {
        let positions: Vec<u32> = (0..TOKENS as u32).map(|i| i % RECORD as u32).collect();
        let rotary = Rotary::new(shape.dim, 10_000.0, RopeScaling::None);
        let tables = rotary.tables(&positions, &Device::flex());
        let x = random([TOKENS, shape.heads, shape.dim]);
        let numbers = 2 * TOKENS * shape.heads * shape.dim;
        bencher.counter(bytes_of(numbers)).bench_local(|| tables.apply(x.clone()));
    }

    #[divan::bench(args = [SMALL, LARGE])]
    fn gradient(bencher: Bencher, shape: Shape) {
        let positions: Vec<u32> = (0..TOKENS as u32).map(|i| i % RECORD as u32).collect();
        let rotary = Rotary::new(shape.dim, 10_000.0, RopeScaling::None);
        let tables = rotary.tables(&positions, &Device::flex());
        let [x, dy] = [(); 2].map(|()| random([TOKENS, shape.heads, shape.dim]));
        let numbers = 4 * TOKENS * shape.heads * shape.dim;
        let turn = || tables.apply(x.clone().tracked());
        bencher.counter(bytes_of(numbers)).bench_local(|| pull_back(&turn(), dy.clone()));
    }

    #[divan::bench(args = [SMALL, LARGE])]
    fn floor(bencher: Bencher, shape: Shape) {
        copy(bencher, 2 * TOKENS * shape.heads * shape.dim);
    }
}

mod attention {
    use super::*;

    fn heads(shape: Shape) -> [Tensor<3>; 3] {
        let [q, kv] = [shape.heads, shape.kv_heads].map(|heads| [TOKENS, heads, shape.dim]);
        [random(q), random(kv), random(kv)]
    }

    fn spans() -> Vec<Span> {
        (0..TOKENS).step_by(RECORD).map(|start| Span::document(start..start + RECORD)).collect()
    }

    /// So many products over the keys that a query sees, half a record's on average.
    fn operations(products: usize, shape: Shape) -> ItemsCount {
        ItemsCount::new(2 * products * TOKENS * shape.heads * shape.dim * RECORD.div_ceil(2))
    }

    /// In what the base computes in.
    fn scoring(shape: Shape) -> Scoring {
        Scoring { precision: Precision::fastest(), ..Scoring::of_heads(shape.dim) }
    }

    #[divan::bench(args = [SMALL, LARGE])]
    fn forward(bencher: Bencher, shape: Shape) {
        let ([q, k, v], spans) = (heads(shape), spans());
        let attend = || pronk_kernels::attention(q.clone(), &k, &v, &spans, scoring(shape));
        bencher.counter(operations(2, shape)).bench_local(attend);
    }

    /// Backwards scores are computed again, and four products more.
    #[divan::bench(args = [SMALL, LARGE])]
    fn gradient(bencher: Bencher, shape: Shape) {
        let (inputs, spans) = (heads(shape), spans());
        let gradient: Tensor<2> = random([TOKENS, shape.heads * shape.dim]);
        bencher.counter(operations(7, shape)).bench_local(|| {
            let [q, k, v] = inputs.clone().map(Tracked::tracked);
            pull_back(&pronk_kernels::attention(q, &k, &v, &spans, scoring(shape)), gradient.clone())
        });
    }
}

mod cross_entropy {
    use super::*;

    const VOCAB: usize = 32_000;

    /// Forwards and backwards through the output projection.
    #[divan::bench(args = [SMALL, LARGE])]
    fn gradient(bencher: Bencher, shape: Shape) {
        let head = frozen(Format::Bf16, [VOCAB, shape.hidden]);
        let hidden = random([TOKENS / 2, shape.hidden]);
        let targets: Vec<u32> = (0..TOKENS as u32 / 2).map(|i| i * 61 % VOCAB as u32).collect();
        let loss = || pronk_kernels::cross_entropy(&hidden, &head, &targets, None, LossGradients::Hidden);
        bencher.counter(ItemsCount::new(2 * TOKENS * VOCAB * shape.hidden)).bench_local(loss);
    }
}

fn frozen(format: Format, shape: [usize; 2]) -> FrozenLinear {
    let numbers: Vec<f32> = random(shape).into_data().try_into_vec().unwrap();
    let matrix = if format == Format::Nf4 {
        FrozenMatrix::nf4(shape, quantize_nf4(&numbers, true)).unwrap()
    } else {
        let halves = numbers.iter().flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes());
        FrozenMatrix::dense(Format::Bf16, shape, halves.collect::<Bytes>()).unwrap()
    };
    FrozenLinear::on_host(Arc::new(matrix), Precision::fastest(), None)
}

/// Products with the largest matrix of a block. Their floor is the processor's peak, to which `peak` comes closest.
mod frozen_product {
    use super::*;

    fn product(bencher: Bencher, format: Format, [out, inputs]: [usize; 2], tokens: usize, back: bool) {
        let linear = frozen(format, [out, inputs]);
        let x = random([tokens, if back { out } else { inputs }]);
        let run = || if back { linear.backward(x.clone()) } else { linear.forward(x.clone()) };
        bencher.counter(ItemsCount::new(2 * tokens * out * inputs)).bench_local(run);
    }

    #[divan::bench(args = [SMALL, LARGE])]
    fn forward_bf16(bencher: Bencher, shape: Shape) {
        product(bencher, Format::Bf16, [shape.inner, shape.hidden], TOKENS, false);
    }

    #[divan::bench(args = [SMALL, LARGE])]
    fn backward_bf16(bencher: Bencher, shape: Shape) {
        product(bencher, Format::Bf16, [shape.inner, shape.hidden], TOKENS, true);
    }

    #[divan::bench(args = [SMALL, LARGE])]
    fn forward_nf4(bencher: Bencher, shape: Shape) {
        product(bencher, Format::Nf4, [shape.inner, shape.hidden], TOKENS, false);
    }

    #[divan::bench(args = [SMALL, LARGE])]
    fn backward_nf4(bencher: Bencher, shape: Shape) {
        product(bencher, Format::Nf4, [shape.inner, shape.hidden], TOKENS, true);
    }

    /// So many tokens that what is done once for the matrix does not count.
    #[divan::bench]
    fn peak(bencher: Bencher) {
        product(bencher, Format::Bf16, [2048, 2048], 8 * TOKENS, false);
    }
}

/// The three products of a block with what gates them, or where that is not one operation, one after another.
mod feed_forward {
    use super::*;
    use pronk_kernels::{Activation, glu};

    fn layers(shape: Shape) -> [FrozenLinear; 3] {
        let Shape { hidden, inner, .. } = shape;
        [[inner, hidden], [inner, hidden], [hidden, inner]].map(|shape| frozen(Format::Bf16, shape))
    }

    fn run([gate, up, down]: [&FrozenLinear; 3], x: &Tensor<2>) -> Tensor<2> {
        let activation = Activation::Silu;
        FrozenLinear::feed_forward([gate, up, down], x, Some(x), activation, true).unwrap_or_else(|| {
            let [gate, up] = [gate, up].map(|layer| layer.product(x.clone()));
            down.product(glu(gate, up, activation, Precision::fastest()))
        })
    }

    #[divan::bench(args = [SMALL, LARGE])]
    fn forward(bencher: Bencher, shape: Shape) {
        let (layers, x) = (layers(shape), random([TOKENS, shape.hidden]));
        let operations = 6 * TOKENS * shape.inner * shape.hidden;
        bencher.counter(ItemsCount::new(operations)).bench_local(|| run(layers.each_ref(), &x));
    }

    #[divan::bench(args = [SMALL, LARGE])]
    fn gradient(bencher: Bencher, shape: Shape) {
        let (layers, x) = (layers(shape), random([TOKENS, shape.hidden]));
        let dy = random([TOKENS, shape.hidden]);
        let operations = 12 * TOKENS * shape.inner * shape.hidden;
        let both = || pull_back(&run(layers.each_ref(), &x.clone().tracked()), dy.clone());
        bencher.counter(ItemsCount::new(operations)).bench_local(both);
    }
}
