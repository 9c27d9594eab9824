use burn::tensor::{Device, Tensor};
use pronk_kernels::{Dropout, DropoutKey, EmbeddingNoise, Mask, Tracked, plain, pull_back};

use crate::reference::{Input, all_devices, assert_close, devices, host};

const SHAPE: [usize; 2] = [301, 77];
const KEY: DropoutKey = DropoutKey { seed: 1, step: 2, micro_batch: 3 };
const NAME: &str = "model.layers.0.self_attn.q_proj";

/// What dropout makes of ones.
fn mask(p: f64, key: DropoutKey, name: &str, device: &Device) -> Vec<f64> {
    host(&Dropout { p, key }.apply(Tensor::ones(SHAPE, device), name))
}

#[test]
fn the_share_of_zeros_is_p_and_the_rest_is_scaled() {
    for (device_name, device) in devices() {
        for p in [0.05, 0.3, 0.9] {
            let mask = mask(p, KEY, NAME, &device);
            let dropped = mask.iter().filter(|&&x| x == 0.0).count() as f64 / mask.len() as f64;
            // Four standard deviations; the draw is the same every time.
            let spread = 4.0 * (p * (1.0 - p) / mask.len() as f64).sqrt();
            assert!((dropped - p).abs() < spread, "{device_name}: {dropped} dropped, expected {p}");
            let kept = 1.0 / (1.0 - p);
            assert!(mask.iter().all(|x| *x == 0.0 || (x / kept - 1.0).abs() < 1e-6), "{device_name}");
        }
        assert!(mask(0.0, KEY, NAME, &device).iter().all(|&x| x == 1.0));
    }
}

#[test]
fn a_mask_depends_on_its_key_and_its_name_alone() {
    for (device_name, device) in devices() {
        let first = mask(0.5, KEY, NAME, &device);
        let others = [
            mask(0.5, KEY, "model.layers.1.self_attn.q_proj", &device),
            mask(0.5, DropoutKey { seed: 2, ..KEY }, NAME, &device),
            mask(0.5, DropoutKey { step: 3, ..KEY }, NAME, &device),
            mask(0.5, DropoutKey { micro_batch: 4, ..KEY }, NAME, &device),
            mask(0.5, DropoutKey { seed: 1, step: 3, micro_batch: 2 }, NAME, &device),
        ];
        assert_eq!(mask(0.5, KEY, NAME, &device), first, "{device_name}: the same again");
        for (i, other) in others.iter().enumerate() {
            let alike = first.iter().zip(other).filter(|(a, b)| a == b).count() as f64 / first.len() as f64;
            assert!((alike - 0.5).abs() < 0.02, "{device_name}: mask {i} agrees with the first in {alike}");
        }
    }
}

/// Every device draws the same, so that a run looks the same on all of them.
#[test]
fn a_mask_is_the_same_on_every_device() {
    let expected = host(&plain::dropout(Tensor::ones(SHAPE, &Device::default()), mask_of(0.3)));
    for (device_name, device) in all_devices() {
        assert_eq!(mask(0.3, KEY, NAME, &device), expected, "{device_name}");
    }
}

fn mask_of(p: f64) -> Mask {
    Dropout { p, key: KEY }.mask(NAME).unwrap()
}

#[test]
fn threads_do_not_disturb_each_other() {
    for (device_name, device) in devices() {
        let names: Vec<String> = (0..8).map(|i| format!("layer {i}")).collect();
        let alone: Vec<Vec<f64>> = names.iter().map(|name| mask(0.5, KEY, name, &device)).collect();
        let together: Vec<Vec<f64>> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                names.iter().map(|name| scope.spawn(|| mask(0.5, KEY, name, &device))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(alone == together, "{device_name}");
    }
}

#[test]
fn the_gradient_passes_through_the_same_mask() {
    for (device_name, device) in devices() {
        let dropout = Dropout { p: 0.4, key: KEY };
        let x = Input::random(SHAPE, 1).on(&device).tracked();
        let y = dropout.apply(x.clone(), NAME);
        let weights = Input::random(SHAPE, 2);
        let gradient = x.grad(&pull_back(&y, weights.on(&device))).unwrap();
        let mask = mask(0.4, KEY, NAME, &device);
        let through =
            |values: Vec<f64>| -> Vec<f64> { values.iter().zip(&mask).map(|(x, m)| x * m).collect() };
        assert_close(&format!("dropout on {device_name}"), &host(&y), &through(host(&x)));
        assert_close(
            &format!("dropout on {device_name}, gradient"),
            &host(&gradient),
            &through(weights.values),
        );
    }
}

#[test]
fn noise_on_embeddings_is_as_large_as_its_record_is_short() {
    for (name, device) in devices() {
        let noise = |step| EmbeddingNoise { alpha: 5.0, key: DropoutKey { seed: 1, step, micro_batch: 0 } };
        let x = Tensor::<2>::zeros([50, 64], &device);
        let noisy = |step| host(&noise(step).apply(x.clone(), &[0..10, 10..50]));
        let found = noisy(0);
        assert_eq!(found, noisy(0), "{name}: another run sees the same");
        assert_ne!(found, noisy(1));
        for (part, length) in [(&found[..640], 10.0), (&found[640..], 40.0)] {
            let bound = 5.0 / (length * 64.0_f64).sqrt();
            let largest = part.iter().fold(0.0_f64, |most, x| most.max(x.abs()));
            assert!(largest <= bound * 1.000_01 && largest > 0.98 * bound, "{name}: {largest} {bound}");
            let mean = part.iter().sum::<f64>() / part.len() as f64;
            // Within five standard errors of a uniform number's mean.
            assert!(mean.abs() < 5.0 * bound / (3.0 * part.len() as f64).sqrt(), "{name}: {mean}");
        }
    }
}
