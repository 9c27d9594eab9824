//! A GGUF file as a base: its metadata as a configuration, its tensors under Hugging Face's
//! names and in Hugging Face's row order, kept as they are.

mod adapter;
mod config;
mod encode;
mod formats;
mod hyper;
mod names;
mod rows;
mod writer;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Cursor;
use std::path::{Path, PathBuf};

use candle_core::Device;
pub use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::gguf_file::{Content, TensorInfo};
use pronk_kernels::{Format, FrozenError, FrozenMatrix};
use safetensors::Dtype;

use crate::family::{Family, Traits};
use crate::mapped::{MappedFile, Pages};
use crate::{DecoderConfig, HostTensor, ModelError};
use config::ROPE_FREQS;
use names::hugging_face_name;
use rows::interleaved_to_halves;

pub use adapter::{GgufAdapter, GgufPair};
pub use writer::{GgufTensor, GgufWriter};

/// An opened GGUF file.
pub struct GgufFile {
    path: PathBuf,
    mapped: MappedFile,
    content: Content,
    /// The file's tensor names by Hugging Face's.
    names: BTreeMap<String, String>,
    traits: &'static Traits,
    heads: usize,
    kv_heads: usize,
}

impl std::fmt::Debug for GgufFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GgufFile").field("path", &self.path).finish_non_exhaustive()
    }
}

impl GgufFile {
    pub(crate) fn open(path: &Path) -> Result<(Self, DecoderConfig), ModelError> {
        let mut file = Self::container(path)?;
        let family = file.family()?;
        file.traits = family.traits();
        let named = |name: &String| (hugging_face_name(name, file.traits), name.clone());
        file.names = file.content.tensor_infos.keys().map(named).collect();
        let config = file.config(family)?;
        (file.heads, file.kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        // The frequencies' factors are the configuration's, not a weight.
        file.names.remove(ROPE_FREQS);
        Ok((file, config))
    }

    /// A whole GGUF file, whatever is in it.
    fn container(path: &Path) -> Result<Self, ModelError> {
        let mapped = MappedFile::open(path)?;
        let content = Content::read(&mut Cursor::new(&mapped[..])).map_err(|e| unreadable(path, &e))?;
        let (names, traits) = (BTreeMap::new(), Family::Llama.traits());
        let file = Self { path: path.into(), mapped, content, names, traits, heads: 1, kv_heads: 1 };
        file.check_length()?;
        Ok(file)
    }

    /// Refuses a file that ends before its last tensor does, as one whose download broke off.
    fn check_length(&self) -> Result<(), ModelError> {
        let end = |info: &TensorInfo| {
            let begin = self.content.tensor_data_offset.checked_add(info.offset)?;
            begin.checked_add(byte_len(info)? as u64)
        };
        let last = self.content.tensor_infos.iter().max_by_key(|(_, info)| end(info).unwrap_or(u64::MAX));
        let Some((name, info)) = last else { return Ok(()) };
        let (end, length) = (end(info).unwrap_or(u64::MAX), self.mapped.len() as u64);
        if end <= length {
            return Ok(());
        }
        let cut = format!(
            "not a whole GGUF file (tensor {name} ends at byte {end}, the file at {length}); \
             if it was downloaded, download it again"
        );
        Err(ModelError::malformed(&self.path, cut))
    }

    /// A text of the metadata.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.content.metadata.get(key)? {
            Value::String(s) => Some(s),
            _ => None,
        }
    }

    /// A number or a flag of the metadata, whatever its width.
    pub fn number(&self, key: &str) -> Option<f64> {
        number(self.content.metadata.get(key)?)
    }

    /// A list of texts of the metadata; empty where there is none.
    pub fn texts(&self, key: &str) -> Vec<String> {
        self.list(key).iter().filter_map(|v| v.to_string().ok().cloned()).collect()
    }

    /// A list of numbers of the metadata; empty where there is none.
    pub fn numbers(&self, key: &str) -> Vec<f64> {
        self.list(key).iter().filter_map(number).collect()
    }

    /// All of the metadata, sorted by key.
    pub fn metadata(&self) -> Vec<(String, Value)> {
        let mut all: Vec<(String, Value)> =
            self.content.metadata.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }

    fn list(&self, key: &str) -> &[Value] {
        self.content.metadata.get(key).and_then(|v| v.to_vec().ok()).map_or(&[], Vec::as_slice)
    }

    /// Everything in front of the first tensor's numbers.
    pub(crate) fn header(&self) -> &[u8] {
        self.mapped.get(..self.content.tensor_data_offset as usize).unwrap_or(&self.mapped)
    }

    pub(crate) fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let shape = |gguf: &String| self.content.tensor_infos.get(gguf).map(|i| i.shape.dims().to_vec());
        self.names.iter().filter_map(|(name, gguf)| Some((name.clone(), shape(gguf)?))).collect()
    }

    /// A matrix where it lies, in its own format and in Hugging Face's row order. `None` for what
    /// is no matrix, or is kept in a format that is not computed with.
    pub(crate) fn matrix(&self, name: &str) -> Option<Result<FrozenMatrix, FrozenError>> {
        let gguf = self.names.get(name)?;
        let info = self.content.tensor_infos.get(gguf)?;
        let &[rows, cols] = info.shape.dims() else { return None };
        let (format, values) = (formats::format(info.ggml_dtype)?, self.pages(name)?.bytes());
        let matrix = match format {
            Format::F32 | Format::F16 | Format::Bf16 => FrozenMatrix::dense(format, [rows, cols], values),
            _ => FrozenMatrix::ggml(format, [rows, cols], values),
        };
        Some(matrix.map(|matrix| match self.interleaved_heads(gguf) {
            Some(heads) => matrix.with_interleaved_heads(rows / heads),
            None => matrix,
        }))
    }

    /// Where a tensor lies; `None` where its numbers have to be spelled out in memory.
    pub(crate) fn pages(&self, name: &str) -> Option<Pages> {
        let info = self.content.tensor_infos.get(self.names.get(name)?)?;
        formats::format(info.ggml_dtype)?;
        let begin = self.content.tensor_data_offset.checked_add(info.offset)? as usize;
        self.mapped.pages(begin..begin.checked_add(byte_len(info)?)?)
    }

    /// A tensor, dequantized to float32, its query and key rows in Hugging Face's order, norms as
    /// Hugging Face stores them.
    pub(crate) fn read(&self, name: &str) -> Option<Result<HostTensor<'static>, ModelError>> {
        if let Some(Ok(matrix)) = self.matrix(name) {
            return Some(Ok(HostTensor::dequantized(&matrix)));
        }
        let gguf = self.names.get(name)?;
        Some(self.dequantize(gguf).map(|(mut values, shape)| {
            if let (Some(heads), Some(&rows)) = (self.interleaved_heads(gguf), shape.first()) {
                values = interleaved_to_halves(&values, rows, heads);
            }
            if self.traits.norms_less_one && name.ends_with("norm.weight") {
                for weight in &mut values {
                    *weight -= 1.0;
                }
            }
            HostTensor::from_f32(&values, shape, Dtype::F32)
        }))
    }

    /// Heads whose rows llama.cpp has in another order.
    fn interleaved_heads(&self, gguf: &str) -> Option<usize> {
        match gguf.rsplit('.').nth(1) {
            _ if !self.traits.gguf_interleaved => None,
            Some("attn_q") => Some(self.heads),
            Some("attn_k") => Some(self.kv_heads),
            _ => None,
        }
    }

    fn dequantize(&self, gguf: &str) -> Result<(Vec<f32>, Vec<usize>), ModelError> {
        // candle would look at the memory of no bytes, which is nowhere.
        if let Some(info) = self.content.tensor_infos.get(gguf).filter(|info| info.shape.elem_count() == 0) {
            let found = info.shape.dims();
            let problem = format!("tensor {gguf}: expected numbers, found none: its shape is {found:?}");
            return Err(ModelError::malformed(&self.path, problem));
        }
        let mut reader = Cursor::new(&self.mapped[..]);
        let mut read = || -> candle_core::Result<_> {
            let tensor = self.content.tensor(&mut reader, gguf, &Device::Cpu)?.dequantize(&Device::Cpu)?;
            Ok((tensor.flatten_all()?.to_vec1()?, tensor.dims().to_vec()))
        };
        read().map_err(|e| ModelError::malformed(&self.path, format!("tensor {gguf}: {}", first_line(&e))))
    }

    /// The format of a quantized tensor.
    pub(crate) fn quantization(&self, name: &str) -> Option<String> {
        let dtype = self.content.tensor_infos.get(self.names.get(name)?)?.ggml_dtype;
        let dense = [Some(Format::F32), Some(Format::F16), Some(Format::Bf16)];
        (!dense.contains(&formats::format(dtype))).then(|| formats::name(dtype))
    }

    /// What has to be spelled out in memory, in words for the user.
    pub(crate) fn note(&self) -> Option<String> {
        let matrices = self.content.tensor_infos.values().filter(|info| info.shape.dims().len() == 2);
        let spelled: Vec<&TensorInfo> =
            matrices.filter(|info| formats::format(info.ggml_dtype).is_none()).collect();
        let names: BTreeSet<String> = spelled.iter().map(|info| formats::name(info.ggml_dtype)).collect();
        let bytes: usize = spelled.iter().map(|info| 4 * info.shape.elem_count()).sum();
        (!spelled.is_empty()).then(|| {
            format!(
                "{}: {} matrices are kept in {}, which is not computed with as it is; as float32 they take {:.1} GB \
                 of memory. A file in Q4_K or Q6_K stays as small as it is",
                self.path.display(),
                spelled.len(),
                names.into_iter().collect::<Vec<_>>().join(", "),
                bytes as f64 / 1e9
            )
        })
    }
}

fn number(value: &Value) -> Option<f64> {
    Some(match value {
        Value::U8(n) => f64::from(*n),
        Value::I8(n) => f64::from(*n),
        Value::U16(n) => f64::from(*n),
        Value::I16(n) => f64::from(*n),
        Value::U32(n) => f64::from(*n),
        Value::I32(n) => f64::from(*n),
        Value::U64(n) => *n as f64,
        Value::I64(n) => *n as f64,
        Value::F32(n) => f64::from(*n),
        Value::F64(n) => *n,
        Value::Bool(b) => f64::from(u8::from(*b)),
        Value::String(_) | Value::Array(_) => return None,
    })
}

/// Bytes that a tensor takes; `None` for more than there can be.
fn byte_len(info: &TensorInfo) -> Option<usize> {
    let numbers = info.shape.dims().iter().try_fold(1usize, |n, &size| n.checked_mul(size))?;
    numbers.div_ceil(info.ggml_dtype.block_size()).checked_mul(info.ggml_dtype.type_size())
}

fn unreadable(path: &Path, error: &candle_core::Error) -> ModelError {
    let words = first_line(error);
    match formats::unread(&words) {
        Some(format) => ModelError::Unsupported {
            path: path.into(),
            problems: vec![format!(
                "a tensor in {format}; expected F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, or Q2_K to Q6_K: take \
                 another file of the same model, such as Q4_K_M"
            )],
        },
        None => ModelError::malformed(
            path,
            format!("not a whole GGUF file ({words}); if it was downloaded, download it again"),
        ),
    }
}

/// The reader's own words: with `RUST_BACKTRACE` set, it puts a backtrace behind them.
fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
