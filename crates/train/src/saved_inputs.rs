//! How the input of a block that will run again waits for the backward pass.

use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use pronk_kernels::computes_on_host;
use serde::{Deserialize, Serialize};

/// `train.saved_inputs`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SavedInputs {
    /// As they are.
    #[default]
    F32,
    /// Rounded to bfloat16: half the memory. A block that runs again then sees its input rounded.
    Bf16,
    /// As they are, in the host's memory. On the processor that is where they are anyway.
    Host,
}

impl SavedInputs {
    /// Bytes that a number takes in the memory that computes, which is the host's or a device's own.
    pub fn bytes_per_number(self, on_host: bool) -> u64 {
        match self {
            Self::Bf16 => 2,
            Self::Host if !on_host => 0,
            Self::F32 | Self::Host => 4,
        }
    }

    pub(crate) fn save(self, x: &Tensor<2>) -> SavedInput {
        match self {
            Self::Bf16 => SavedInput::Tensor(Box::new(x.clone().cast(FloatDType::BF16))),
            Self::Host if !computes_on_host(&x.device()) => SavedInput::Data(x.to_data()),
            Self::F32 | Self::Host => SavedInput::Tensor(Box::new(x.clone())),
        }
    }
}

/// A block's input that was saved.
pub(crate) enum SavedInput {
    Tensor(Box<Tensor<2>>),
    Data(TensorData),
}

impl SavedInput {
    /// The input as the block takes it.
    pub fn restored(self, device: &Device) -> Tensor<2> {
        match self {
            Self::Tensor(x) => x.cast(FloatDType::F32),
            Self::Data(data) => Tensor::from_data(data, device),
        }
    }
}

#[cfg(all(test, any(feature = "flex", feature = "tch")))]
#[allow(clippy::float_cmp, clippy::unwrap_used)] // what comes back is the very same; a test panics
mod tests {
    use pronk_kernels::open_device;

    use super::*;

    #[test]
    fn what_was_saved_comes_back() {
        let device = open_device("auto").unwrap();
        let numbers = [0.1_f32, -3.0, 1e-30, 65_537.0, 0.0, 2.5];
        let x = Tensor::<2>::from_data(TensorData::new(numbers.to_vec(), [2, 3]), &device);
        let back = |saved: SavedInput| saved.restored(&device).try_to_vec_as::<f32>().unwrap();
        assert_eq!(back(SavedInputs::F32.save(&x)), numbers);
        assert_eq!(back(SavedInputs::Host.save(&x)), numbers);
        assert_eq!(back(SavedInput::Data(x.to_data())), numbers, "as on a device with a memory of its own");
        for (found, number) in back(SavedInputs::Bf16.save(&x)).into_iter().zip(numbers) {
            assert!((found - number).abs() <= number.abs() / 256.0, "{found} {number}");
        }
    }
}
