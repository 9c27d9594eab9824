//! Reads the answers under `tests/golden` of the workspace and compares with them.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use pronk_kernels::open_devices;
use safetensors::SafeTensors;

/// Every device that this build has and this machine, with its name; there is at least one.
pub fn devices() -> Vec<(String, Device)> {
    let devices = open_devices();
    assert!(!devices.is_empty(), "these tests need a CPU backend: --features flex, or tch");
    devices
}

/// `name` under the workspace's root.
pub fn workspace(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(name)
}

/// A safetensors file of answers.
pub struct Answers {
    bytes: Vec<u8>,
}

impl Answers {
    /// `name` is relative to `tests/golden`.
    pub fn read(name: &str) -> Self {
        let path = workspace("tests/golden").join(name);
        Self { bytes: std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display())) }
    }

    fn chunks<const N: usize>(&self, tensor: &str) -> Vec<[u8; N]> {
        let file = SafeTensors::deserialize(&self.bytes).expect("a whole file");
        let view = file.tensor(tensor).unwrap_or_else(|e| panic!("{tensor}: {e}"));
        view.data().chunks_exact(N).map(|b| b.try_into().expect("N bytes")).collect()
    }

    pub fn floats(&self, tensor: &str) -> Vec<f32> {
        self.chunks(tensor).into_iter().map(f32::from_le_bytes).collect()
    }

    /// An int64 tensor of token ids or of counts.
    pub fn ids(&self, tensor: &str) -> Vec<u32> {
        let whole = self.chunks(tensor).into_iter().map(i64::from_le_bytes);
        whole.map(|id| id.try_into().expect("an id")).collect()
    }
}

pub fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.try_into_vec_as().expect("numbers from the device")
}

/// The largest difference in units of the largest expected number; refuses what is not finite.
pub fn relative_error(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    assert!(found.iter().all(|x| x.is_finite()), "not all numbers are finite");
    let difference = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    difference / expected.iter().fold(0.0, |top, x| x.abs().max(top))
}

/// Fails where `found` is further than `tolerance` from `expected`; `--nocapture` shows how far it is.
pub fn assert_close(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    let error = relative_error(found, expected);
    println!("{what}: relative error {error:.2e}");
    assert!(error <= tolerance, "{what}: relative error {error:e}, allowed are {tolerance:e}");
}
