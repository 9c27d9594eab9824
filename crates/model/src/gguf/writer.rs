//! A GGUF file, version 3, written a tensor at a time.
//!
//! <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. candle's own writer wants all tensors at once.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use candle_core::quantized::gguf_file::Value;
use pronk_kernels::Format;

use super::{encode, formats};
use crate::weights_writer::unwritten;
use crate::{ModelError, Staging};

const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;
/// What tensors begin at multiples of, where `general.alignment` says nothing.
const ALIGNMENT: usize = 32;

/// A tensor that is going to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    /// Its name, as llama.cpp has it.
    pub name: String,
    /// Its shape, rows first.
    pub shape: Vec<usize>,
    /// What its numbers are kept in.
    pub format: Format,
}

/// Writes a GGUF file into a staging directory as a stream, so that no tensor is ever kept.
#[derive(Debug)]
pub struct GgufWriter {
    /// As errors name it.
    path: PathBuf,
    file: BufWriter<File>,
    left: VecDeque<GgufTensor>,
    /// Of all tensors, written or not.
    bytes: u64,
}

impl GgufWriter {
    /// Begins the file `name` in `staging`: `metadata` in this order, and all about `tensors` but their numbers.
    pub fn create(
        staging: &Staging,
        name: &str,
        metadata: &[(String, Value)],
        tensors: Vec<GgufTensor>,
    ) -> Result<Self, ModelError> {
        let path = staging.destination().join(name);
        let malformed = |problem: String| ModelError::malformed(&path, problem);
        let mut header = Vec::from(*MAGIC);
        header.extend(VERSION.to_le_bytes());
        header.extend((tensors.len() as u64).to_le_bytes());
        header.extend((metadata.len() as u64).to_le_bytes());
        for (key, value) in metadata {
            add_text(&mut header, key);
            add_value(&mut header, value).map_err(|problem| malformed(format!("{key}: {problem}")))?;
        }
        let mut end = 0;
        for tensor in &tensors {
            let size = tensor.bytes().map_err(malformed)?;
            tensor.describe(&mut header, end).map_err(malformed)?;
            end += size.next_multiple_of(ALIGNMENT) as u64;
        }
        header.resize(header.len().next_multiple_of(ALIGNMENT), 0);
        let begin = || {
            let mut file = BufWriter::with_capacity(1 << 20, File::create_new(staging.path().join(name))?);
            file.write_all(&header).map(|()| file)
        };
        let file = begin().map_err(|e| unwritten(&path, e, end))?;
        Ok(Self { path, file, left: tensors.into(), bytes: end })
    }

    /// Writes the next tensor: its name, and its numbers row by row, which become its format.
    pub fn write(&mut self, name: &str, values: &[f32]) -> Result<(), ModelError> {
        let malformed = |problem: String| ModelError::malformed(&self.path, problem);
        let tensor = self.left.pop_front().filter(|next| next.name == name);
        let Some(tensor) = tensor else { return Err(malformed(format!("{name}: not the next tensor"))) };
        let expected: usize = tensor.shape.iter().product();
        if values.len() != expected {
            return Err(malformed(format!("{name}: expected {expected} numbers, found {}", values.len())));
        }
        let columns = tensor.shape.last().copied().unwrap_or(0);
        let mut bytes = encode::encode(values, columns, tensor.format).map_err(malformed)?;
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        self.file.write_all(&bytes).map_err(|e| unwritten(&self.path, e, self.bytes))
    }

    /// Finishes the file; how many bytes its tensors take.
    pub fn finish(mut self) -> Result<u64, ModelError> {
        if let Some(next) = self.left.front() {
            let problem =
                format!("expected {} more tensors, {} the next of them", self.left.len(), next.name);
            return Err(ModelError::malformed(&self.path, problem));
        }
        self.file.flush().map_err(|e| unwritten(&self.path, e, self.bytes))?;
        Ok(self.bytes)
    }
}

impl GgufTensor {
    fn bytes(&self) -> Result<usize, String> {
        encode::bytes(&self.shape, self.format).map_err(|problem| format!("{}: {problem}", self.name))
    }

    /// Adds what the header says of it; its numbers begin at `offset`.
    fn describe(&self, header: &mut Vec<u8>, offset: u64) -> Result<(), String> {
        let dtype = formats::dtype(self.format).ok_or_else(|| format!("{}: no such format", self.name))?;
        add_text(header, &self.name);
        header.extend((self.shape.len() as u32).to_le_bytes());
        // The fastest dimension comes first there.
        header.extend(self.shape.iter().rev().flat_map(|&size| (size as u64).to_le_bytes()));
        header.extend(formats::number(dtype).to_le_bytes());
        header.extend(offset.to_le_bytes());
        Ok(())
    }
}

fn add_text(header: &mut Vec<u8>, text: &str) {
    header.extend((text.len() as u64).to_le_bytes());
    header.extend(text.as_bytes());
}

/// Adds a value behind its type.
fn add_value(header: &mut Vec<u8>, value: &Value) -> Result<(), String> {
    header.extend(type_number(value).to_le_bytes());
    add_bare(header, value)
}

fn add_bare(header: &mut Vec<u8>, value: &Value) -> Result<(), String> {
    match value {
        Value::U8(n) => header.push(*n),
        Value::I8(n) => header.extend(n.to_le_bytes()),
        Value::U16(n) => header.extend(n.to_le_bytes()),
        Value::I16(n) => header.extend(n.to_le_bytes()),
        Value::U32(n) => header.extend(n.to_le_bytes()),
        Value::I32(n) => header.extend(n.to_le_bytes()),
        Value::F32(n) => header.extend(n.to_le_bytes()),
        Value::U64(n) => header.extend(n.to_le_bytes()),
        Value::I64(n) => header.extend(n.to_le_bytes()),
        Value::F64(n) => header.extend(n.to_le_bytes()),
        Value::Bool(flag) => header.push(u8::from(*flag)),
        Value::String(text) => add_text(header, text),
        Value::Array(values) => {
            // An empty list says nothing of its type. The one that may be empty, merges, is of texts.
            let kind = values.first().map_or(TEXT, type_number);
            if values.iter().any(|value| type_number(value) != kind) {
                return Err("a list of values of several types".to_owned());
            }
            header.extend(kind.to_le_bytes());
            header.extend((values.len() as u64).to_le_bytes());
            values.iter().try_for_each(|value| add_bare(header, value))?;
        }
    }
    Ok(())
}

/// The type of texts.
const TEXT: u32 = 8;

/// The number that stands for a value's type, `gguf_metadata_value_type`.
fn type_number(value: &Value) -> u32 {
    match value {
        Value::U8(_) => 0,
        Value::I8(_) => 1,
        Value::U16(_) => 2,
        Value::I16(_) => 3,
        Value::U32(_) => 4,
        Value::I32(_) => 5,
        Value::F32(_) => 6,
        Value::Bool(_) => 7,
        Value::String(_) => TEXT,
        Value::Array(_) => 9,
        Value::U64(_) => 10,
        Value::I64(_) => 11,
        Value::F64(_) => 12,
    }
}
