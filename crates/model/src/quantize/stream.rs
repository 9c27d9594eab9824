//! The order in which a quantized checkpoint's tensors are written.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};

use super::tensor::{QuantizedTensor, Sink, constant};
use crate::{HostTensor, ModelError, TensorSpec};

/// Puts the tensors that come of a base's in the order of the checkpoint, in which every number
/// lies at a multiple of its width: what is the same everywhere, then what takes a multiple of four
/// bytes, then the rest. All that a Llama of any usual size becomes is of the second kind, and
/// written as it comes; the rest is a few bytes a matrix, and is kept until its turn.
#[derive(Debug)]
pub struct QuantizedStream {
    left: VecDeque<TensorSpec>,
    kept: BTreeMap<String, Vec<u8>>,
    /// Where the tensors come from, for errors.
    base: PathBuf,
}

impl QuantizedStream {
    /// For `tensors` of `base`, which have to be written in this order.
    pub fn new(base: &Path, tensors: &[QuantizedTensor]) -> Self {
        let mut left: Vec<TensorSpec> = tensors.iter().flat_map(QuantizedTensor::specs).collect();
        left.sort_by_key(turn); // keeps the order of what has the same turn
        Self { left: left.into(), kept: BTreeMap::new(), base: base.into() }
    }

    /// What is still going to be written, in order.
    pub fn specs(&self) -> Vec<TensorSpec> {
        self.left.iter().cloned().collect()
    }

    /// Writes what `host`, the next of the tensors, becomes, and whatever is due then.
    pub fn write(
        &mut self,
        tensor: &QuantizedTensor,
        host: HostTensor,
        sink: &mut Sink,
    ) -> Result<(), ModelError> {
        flush(&mut self.left, &mut self.kept, sink)?;
        let Self { left, kept, base } = self;
        tensor.write(base, host, &mut |name, bytes| {
            if left.front().is_some_and(|next| next.name == name) {
                left.pop_front();
                sink(name, bytes)?;
                flush(left, kept, sink)
            } else {
                kept.insert(name.to_owned(), bytes.to_vec());
                Ok(())
            }
        })
    }
}

/// Writes what is due and there.
fn flush(
    left: &mut VecDeque<TensorSpec>,
    kept: &mut BTreeMap<String, Vec<u8>>,
    sink: &mut Sink,
) -> Result<(), ModelError> {
    while let Some(next) = left.front() {
        let Some(bytes) = kept.remove(&next.name).or_else(|| constant(&next.name)) else { break };
        sink(&next.name, &bytes)?;
        left.pop_front();
    }
    Ok(())
}

fn turn(spec: &TensorSpec) -> u8 {
    match (spec.bytes() % 4, spec.dtype.bitsize()) {
        (0, _) if constant(&spec.name).is_some() => 0,
        (0, _) => 1,
        (_, 16) => 2,
        _ => 3,
    }
}
