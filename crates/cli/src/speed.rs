//! How fast a device multiplies.

use std::sync::Arc;
use std::time::Instant;

use burn::tensor::{Device, Tensor, TensorData};
use bytes::Bytes;
use pronk_kernels::{Format, FrozenLinear, FrozenMatrix, Precision};

/// Features of the layer that is measured: those of a 7B.
const SIDE: usize = 4096;

/// Multiplications and additions a second of `tokens` tokens with a matrix of a 7B's size, there and
/// back, by the product that training uses on `device`: the best of `rounds`, after one to warm up.
/// `None` where the device fails.
pub fn operations_per_second(
    device: &Device,
    precision: Precision,
    tokens: usize,
    rounds: usize,
) -> Option<f64> {
    // Small numbers, none of them zero: a graphics card runs faster on zeros.
    let small = |i: usize| (i % 13) as f32 / 16.0 - 0.406_25;
    let weights = (0..SIDE * SIDE).flat_map(|i| ((small(i).to_bits() >> 16) as u16).to_le_bytes());
    let weights = Bytes::from(weights.collect::<Vec<u8>>());
    let matrix = FrozenMatrix::dense(Format::Bf16, [SIDE, SIDE], weights).ok()?;
    let linear = FrozenLinear::on_host(Arc::new(matrix), precision, None).on_device(device);
    let x: Vec<f32> = (0..tokens * SIDE).map(small).collect();
    let x = Tensor::<2>::from_data(TensorData::new(x, [tokens, SIDE]), device);
    let once = || {
        device.sync().ok()?;
        let started = Instant::now();
        let y = linear.forward(x.clone());
        let _dx = linear.backward(y);
        device.sync().ok()?;
        Some(4.0 * (tokens * SIDE * SIDE) as f64 / started.elapsed().as_secs_f64())
    };
    once()?;
    (0..rounds).filter_map(|_| once()).max_by(f64::total_cmp)
}
