//! Factors of a matrix whose singular values are known.
#![allow(clippy::unwrap_used)] // a test reports by panicking

use burn::tensor::{Tensor, TensorData};
use pronk_kernels::open_device;
use pronk_lora::{low_rank_factors, low_rank_factors_over};

/// Number `k` of the orthonormal vectors of a cosine transform of size `n`.
fn cosine(n: usize, k: usize) -> Vec<f64> {
    let angle = |i: usize| std::f64::consts::PI * (i as f64 + 0.5) * k as f64 / n as f64;
    let norm = if k == 0 { 1.0 / n as f64 } else { 2.0 / n as f64 };
    (0..n).map(|i| norm.sqrt() * angle(i).cos()).collect()
}

/// With the singular values `0.8^k`.
fn matrix(rows: usize, cols: usize) -> Vec<f32> {
    let mut sum = vec![0.0; rows * cols];
    for k in 0..rows.min(cols) {
        let (u, v, s) = (cosine(rows, k), cosine(cols, k), 0.8_f64.powi(k as i32));
        for (row, u) in sum.chunks_mut(cols).zip(&u) {
            row.iter_mut().zip(&v).for_each(|(x, v)| *x += s * u * v);
        }
    }
    sum.into_iter().map(|x| x as f32).collect()
}

#[test]
fn the_largest_singular_values_are_kept() {
    let device = open_device("auto").unwrap();
    // Small ones exactly, large ones by random directions; wide and tall.
    for ([rows, cols], rank) in [([20, 30], 6), ([160, 120], 8), ([90, 200], 12)] {
        let m = Tensor::<2>::from_data(TensorData::new(matrix(rows, cols), [rows, cols]), &device);
        let factors = low_rank_factors(&m, rank, 4, 3, "m");
        assert_eq!((factors.a.dims(), factors.b.dims()), ([rank, cols], [rows, rank]));
        let square = |t: Tensor<2>| f64::from(t.square().sum().into_scalar::<f32>());
        let energy = |from: usize, to: usize| (from..to).map(|k| 0.8_f64.powi(2 * k as i32)).sum::<f64>();
        let (kept, lost) = (energy(0, rank), energy(rank, rows.min(cols)));
        assert!((f64::from(factors.energy.into_scalar::<f32>()) / kept - 1.0).abs() < 1e-4);
        let off = square(m.clone() - factors.b.clone().matmul(factors.a.clone()));
        assert!((off / lost - 1.0).abs() < 1e-2, "{rows} x {cols}: {off}, the best is {lost}");
        let (a, b) = (square(factors.a.clone()), square(factors.b));
        assert!((a / b - 1.0).abs() < 1e-4, "both factors are as large");

        let again = low_rank_factors(&m, rank, 4, 3, "m").a.try_to_vec_as::<f32>().unwrap();
        assert_eq!(again, factors.a.try_to_vec_as::<f32>().unwrap(), "the same seed, the same bits");
    }
}

/// Of the product with some inputs nothing better can be kept than its own largest singular values.
#[test]
fn over_inputs_the_products_largest_singular_values_are_kept() {
    let device = open_device("auto").unwrap();
    for ([rows, cols], rank) in [([20, 30], 6), ([160, 120], 8), ([90, 200], 12)] {
        let tensor = |[rows, cols]: [usize; 2]| {
            Tensor::<2>::from_data(TensorData::new(matrix(rows, cols), [rows, cols]), &device)
        };
        let (m, x) = (tensor([rows, cols]), tensor([140, cols]));
        let products = x.clone().transpose().matmul(x.clone());
        let factors = low_rank_factors_over(&m, &products, rank, 4, 3, "m");
        assert_eq!((factors.a.dims(), factors.b.dims()), ([rank, cols], [rows, rank]));
        let square = |t: Tensor<2>| f64::from(t.square().sum().into_scalar::<f32>());
        let whole = m.clone().matmul(x.clone().transpose());
        let best = f64::from(low_rank_factors(&whole, rank, 9, 3, "best").energy.into_scalar::<f32>());
        assert!((f64::from(factors.energy.into_scalar::<f32>()) / best - 1.0).abs() < 1e-4);
        let off = square((m - factors.b.clone().matmul(factors.a.clone())).matmul(x.transpose()));
        let lost = square(whole) - best;
        assert!((off / lost - 1.0).abs() < 2e-2, "{rows} x {cols}: {off}, the best is {lost}");
        let (a, b) = (square(factors.a), square(factors.b));
        assert!((a / b - 1.0).abs() < 1e-3, "both factors are as large");
    }
}
