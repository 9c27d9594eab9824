use std::path::Path;

use crate::{ModelError, ShardSpec, Staging, TensorSpec, WeightsWriter, WrittenWeights};

/// Writes a Hugging Face directory as a stream: one tensor at a time, and never more of them in
/// memory than the caller keeps. Whatever fails, and a writer that is dropped before
/// [`CheckpointWriter::finish`], leaves nothing behind.
#[derive(Debug)]
pub struct CheckpointWriter {
    weights: WeightsWriter,
    staging: Staging,
}

impl CheckpointWriter {
    /// Begins a checkpoint in the directory `dir`, which must not exist or be empty, with these
    /// `tensors` in this order: in one `model.safetensors`, or where they are larger than
    /// `shard_bytes`, in files of at most that, with their index.
    ///
    /// Tensors of several formats come widest first, so that all their numbers lie aligned.
    pub fn create(dir: &Path, tensors: Vec<TensorSpec>, shard_bytes: usize) -> Result<Self, ModelError> {
        let staging = Staging::beside(dir, None)?;
        let weights = WeightsWriter::new(&staging, ShardSpec::split(tensors, shard_bytes));
        Ok(Self { weights, staging })
    }

    /// Writes the next tensor: its name, and its numbers little-endian, row by row.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), ModelError> {
        self.weights.write(name, bytes)
    }

    /// Writes a file that goes with the weights, such as `config.json`.
    pub fn add_file(&mut self, name: &str, bytes: &[u8]) -> Result<(), ModelError> {
        self.staging.add_file(name, bytes)
    }

    /// Makes sure that all of it is there and on the disk, and gives the directory its name.
    pub fn finish(self) -> Result<WrittenWeights, ModelError> {
        let written = self.weights.finish()?;
        self.staging.publish()?;
        Ok(written)
    }
}
