//! Products with frozen matrices in every format, both ways, against float64 loops over the
//! numbers that the format holds.

use std::sync::Arc;

use burn::tensor::{Tensor, TensorData};
use bytes::Bytes;
use half::bf16;
use pronk_kernels::{
    Format, FrozenLinear, FrozenMatrix, Precision, Tracked, pull_back, quantize_int8, quantize_nf4,
};

use crate::frozen_formats::random_blocks;
use crate::reference::{assert_close, devices, host, numbers};

/// A matrix of every kind that can be made from floats, and one of each of llama.cpp's. Shapes that fill
/// no tile, or just one.
pub fn matrices() -> Vec<FrozenMatrix> {
    let mut all = Vec::new();
    for [rows, cols] in [[1, 1], [7, 33], [64, 64], [65, 130], [130, 600], [300, 257]] {
        let values: Vec<f32> = numbers(rows * cols, 7).into_iter().map(|x| x as f32).collect();
        let floats = |bytes: fn(f32) -> Vec<u8>| values.iter().flat_map(|&x| bytes(x)).collect::<Bytes>();
        let dense = |format, bytes| FrozenMatrix::dense(format, [rows, cols], bytes).unwrap();
        all.push(dense(Format::F32, floats(|x| x.to_le_bytes().to_vec())));
        all.push(dense(Format::Bf16, floats(|x| bf16::from_f32(x).to_le_bytes().to_vec())));
        all.push(dense(Format::F16, floats(|x| half::f16::from_f32(x).to_le_bytes().to_vec())));
        for double in [false, true] {
            all.push(FrozenMatrix::nf4([rows, cols], quantize_nf4(&values, double)).unwrap());
        }
        let (codes, scales) = quantize_int8(&values, rows);
        all.push(FrozenMatrix::int8([rows, cols], codes, scales).unwrap());
    }
    let ggml = [
        (Format::Q4_0, 96),
        (Format::Q4_1, 64),
        (Format::Q5_0, 160),
        (Format::Q5_1, 32),
        (Format::Q8_0, 544),
        (Format::Q4K, 768),
        (Format::Q5K, 256),
        (Format::Q6K, 512),
    ];
    for (format, cols) in ggml {
        let rows = 66;
        let blocks = random_blocks(format, format.bytes_for(rows, cols) / format.bytes_for(1, 1), 5);
        let matrix = FrozenMatrix::ggml(format, [rows, cols], blocks.into()).unwrap();
        all.push(if format == Format::Q4_0 { matrix.with_interleaved_heads(22) } else { matrix });
    }
    all
}

/// The whole matrix in float64.
pub fn spelled_out(w: &FrozenMatrix) -> Vec<f64> {
    let [rows, cols] = w.shape();
    let mut row = vec![0.0; cols];
    let spell = |r| {
        w.dequantize(r, 0..cols, &mut row);
        row.iter().map(|&x| f64::from(x)).collect::<Vec<_>>()
    };
    (0..rows).flat_map(spell).collect()
}

/// What factors are rounded to before they are multiplied.
fn rounded(values: &[f64], precision: Precision) -> Vec<f64> {
    let round = |&x: &f64| match precision {
        Precision::F32 => x,
        Precision::Bf16 => f64::from(bf16::from_f32(x as f32).to_f32()),
    };
    values.iter().map(round).collect()
}

/// `a b`, `[m, k]` by `[k, n]`, with b's strides.
pub fn product(a: &[f64], b: &[f64], [m, n, k]: [usize; 3], (row, column): (usize, usize)) -> Vec<f64> {
    let sum = |i: usize, j: usize| (0..k).map(|t| a[i * k + t] * b[t * row + j * column]).sum::<f64>();
    (0..m * n).map(|at| sum(at / n, at % n)).collect()
}

pub fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&x| x as f32).collect()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

#[test]
fn every_format_multiplies_both_ways() {
    for w in matrices() {
        let [rows, cols] = w.shape();
        let exact = spelled_out(&w);
        for (tokens, precision) in
            [(1, Precision::F32), (5, Precision::F32), (5, Precision::Bf16), (47, Precision::Bf16)]
        {
            let what = format!("{tokens} tokens through {} [{rows}, {cols}] in {precision:?}", w.format());
            // Where no unit multiplies bf16, and for the few tokens of a generation, nothing is rounded.
            let used = if Precision::fastest() == Precision::Bf16 { precision } else { Precision::F32 };
            let factors = rounded(&exact, used);
            let x = numbers(tokens * cols, 1);
            let y = product(&rounded(&x, used), &factors, [tokens, rows, cols], (1, cols));
            assert_close(&format!("{what}, forward"), &wide(&w.forward(&narrow(&x), precision)), &y);
            let dy = numbers(tokens * rows, 2);
            let dx = product(&rounded(&dy, used), &factors, [tokens, cols, rows], (cols, 1));
            assert_close(&format!("{what}, backward"), &wide(&w.backward(&narrow(&dy), precision)), &dx);
        }
    }
}

/// More tokens than go through together: the second batch of them must land behind the first.
#[test]
fn more_tokens_than_one_pass_takes() {
    let values: Vec<u8> = numbers(33 * 40, 3).into_iter().flat_map(|x| (x as f32).to_le_bytes()).collect();
    let w = FrozenMatrix::dense(Format::F32, [33, 40], values.into()).unwrap();
    let x = narrow(&numbers(1100 * 40, 4));
    for precision in [Precision::F32, Precision::Bf16] {
        let together = w.forward(&x, precision);
        let apart: Vec<f32> = x.chunks(550 * 40).flat_map(|x| w.forward(x, precision)).collect();
        assert_close("forward in two halves", &wide(&apart), &wide(&together));
        let together = w.backward(&w.forward(&x, precision), precision);
        let apart: Vec<f32> =
            x.chunks(550 * 40).flat_map(|x| w.backward(&w.forward(x, precision), precision)).collect();
        assert_close("backward in two halves", &wide(&apart), &wide(&together));
    }
    assert!(w.forward(&[], Precision::Bf16).is_empty());
}

/// On every backend, recorded or not, the operation is the matrix' own product; its gradient too.
#[test]
fn the_operation_is_the_product_and_its_gradient_the_product_back() {
    let w = Arc::new(matrices().swap_remove(3));
    let [rows, cols] = w.shape();
    for (name, device) in devices() {
        let linear = FrozenLinear::on_host(Arc::clone(&w), Precision::F32, None);
        let (x, dy) = (narrow(&numbers(6 * cols, 1)), narrow(&numbers(6 * rows, 2)));
        let on = |values: &[f32], width| {
            Tensor::<2>::from_data(TensorData::new(values.to_vec(), [6, width]), &device)
        };
        let expected = wide(&w.forward(&x, Precision::F32));
        assert_eq!(host(&linear.forward(on(&x, cols))), expected, "plain, on {name}");

        // A transposed view has no contiguous numbers to lend.
        let tracked = on(&x, cols).transpose().tracked();
        let y = linear.forward(tracked.clone().transpose());
        assert_eq!(host(&y.clone().inner()), expected, "recorded, on {name}");
        let mut gradients = pull_back(&y, on(&dy, rows));
        let dx = tracked.grad_remove(&mut gradients).unwrap().transpose();
        assert_eq!(host(&dx), wide(&w.backward(&dy, Precision::F32)), "gradient, on {name}");
        assert_eq!(host(&linear.backward(on(&dy, rows))), host(&dx), "backward, on {name}");
    }
}
