//! What an adapter trains whole, as a base has it before the first step.

use burn::tensor::{Device, Tensor, TensorData};
use pronk_lora::{Adapter, LM_HEAD};

use crate::{Base, ModelError};

impl Base {
    /// Gives the fresh `adapter` what it trains whole, in float32 whatever the base keeps it in, and embeddings and
    /// head a row for each of `vocab_size` tokens.
    pub fn set_whole(
        &self,
        adapter: &mut Adapter,
        vocab_size: usize,
        device: &Device,
    ) -> Result<(), ModelError> {
        for (name, shape) in adapter.config.whole(&self.config.adapter_modules())? {
            let own = name.to_string();
            let own = if name.module == LM_HEAD { self.config.head_weight() } else { &own };
            let values = self.read(own)?.to_f32();
            adapter.whole.insert(name, Tensor::from_data(TensorData::new(values, shape), device));
        }
        adapter.grow_vocabulary(vocab_size);
        Ok(())
    }
}
