//! A checkpoint's weight files, written a tensor at a time.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::File;
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::json;

use crate::{ModelError, Staging};

/// The one file of a checkpoint that needs no index.
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A tensor that is going to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its format.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// How many bytes its numbers take. `usize::MAX` stands for more than there are.
    pub fn bytes(&self) -> usize {
        let bits = self.shape.iter().fold(self.dtype.bitsize(), |bits, &n| bits.saturating_mul(n));
        if bits == usize::MAX { bits } else { bits / 8 }
    }
}

/// A file that is going to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardSpec {
    /// Its name.
    pub file: String,
    /// Its tensors, in their order.
    pub tensors: Vec<TensorSpec>,
}

impl ShardSpec {
    /// Distributes `tensors`, in their order, over files of at most `shard_bytes`; a tensor that
    /// is larger than that has a file of its own. Named as transformers names them.
    pub fn split(tensors: Vec<TensorSpec>, shard_bytes: usize) -> Vec<Self> {
        let mut groups = vec![Vec::new()];
        let mut size: usize = 0;
        for tensor in tensors {
            let bytes = tensor.bytes();
            if size > 0 && size.saturating_add(bytes) > shard_bytes {
                groups.push(Vec::new());
                size = 0;
            }
            size = size.saturating_add(bytes);
            if let Some(group) = groups.last_mut() {
                group.push(tensor);
            }
        }
        let count = groups.len();
        let file = |i: usize| match count {
            1 => SINGLE.to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        groups.into_iter().enumerate().map(|(i, tensors)| Self { file: file(i), tensors }).collect()
    }
}

/// The weights that a [`WeightsWriter`] has written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrittenWeights {
    /// The files, in order.
    pub files: Vec<String>,
    /// How many tensors are in them.
    pub tensors: usize,
    /// Bytes that their numbers take.
    pub bytes: u64,
}

/// Writes the weight files of a checkpoint, and the index that several of them need. Each file's
/// header is known before its first number is, so that no tensor is ever kept.
///
/// safetensors' own writer wants all tensors at once, makes none of them that could fail, and
/// makes the file its owner's alone.
#[derive(Debug)]
pub struct WeightsWriter {
    dir: PathBuf,
    /// The directory as errors name it.
    shown: PathBuf,
    /// What has not been begun.
    shards: VecDeque<ShardSpec>,
    open: Option<OpenShard>,
    files: Vec<String>,
    /// Files by tensor, of the files that have been begun.
    weight_map: BTreeMap<String, String>,
    /// Of all tensors, written or not.
    bytes: u64,
    /// Tensors not written. A file that could not be begun is in none of the lists above.
    left: usize,
}

impl WeightsWriter {
    /// Will write `shards` in the directory `staging`.
    pub fn new(staging: &Staging, shards: Vec<ShardSpec>) -> Self {
        let bytes = shards.iter().flat_map(|s| &s.tensors).map(|t| t.bytes() as u64);
        Self {
            dir: staging.path().into(),
            shown: staging.destination().into(),
            bytes: bytes.fold(0, u64::saturating_add),
            left: shards.iter().map(|s| s.tensors.len()).sum(),
            shards: shards.into(),
            open: None,
            files: Vec::new(),
            weight_map: BTreeMap::new(),
        }
    }

    /// Writes the tensor called `name`, little-endian, row by row. The tensors have to come in
    /// the order of the shards and of the tensors in them.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), ModelError> {
        while self.open.as_ref().is_none_or(|shard| shard.left.is_empty()) {
            if !self.advance()? {
                let found = format!("expected no more tensors, found {name}");
                return Err(ModelError::malformed(&self.shown, found));
            }
        }
        let Some(shard) = &mut self.open else { return Ok(()) }; // there is one, see above
        shard.write(name, bytes, self.bytes)?;
        self.left -= 1;
        Ok(())
    }

    /// Finishes the last file, and writes which tensor is in which file where there is more to
    /// know than one file's name.
    pub fn finish(mut self) -> Result<WrittenWeights, ModelError> {
        while self.advance()? {}
        if self.left > 0 {
            let problem = format!("expected {} more tensors, which could not be written", self.left);
            return Err(ModelError::malformed(&self.shown, problem));
        }
        if self.files != [SINGLE] {
            let index = json!({"metadata": {"total_size": self.bytes}, "weight_map": self.weight_map});
            let file = File::create_new(self.dir.join(INDEX));
            let written = file.and_then(|mut file| file.write_all(format!("{index:#}\n").as_bytes()));
            written.map_err(ModelError::io(&self.shown.join(INDEX)))?;
        }
        Ok(WrittenWeights { files: self.files, tensors: self.weight_map.len(), bytes: self.bytes })
    }

    /// From one file to the next; whether there was one.
    fn advance(&mut self) -> Result<bool, ModelError> {
        if let Some(shard) = self.open.take() {
            shard.close(self.bytes)?;
        }
        let Some(spec) = self.shards.pop_front() else { return Ok(false) };
        self.files.push(spec.file.clone());
        let path = self.shown.join(&spec.file);
        for TensorSpec { name, .. } in &spec.tensors {
            if let Some(first) = self.weight_map.insert(name.clone(), spec.file.clone()) {
                let found = format!("expected tensors of different names, found {name} here and in {first}");
                return Err(ModelError::malformed(&path, found));
            }
        }
        self.open = Some(OpenShard::create(&self.dir, path, spec, self.bytes)?);
        Ok(true)
    }
}

/// A file that is being written.
#[derive(Debug)]
struct OpenShard {
    /// As errors name it.
    path: PathBuf,
    file: BufWriter<File>,
    /// What it is still to hold.
    left: VecDeque<TensorSpec>,
}

impl OpenShard {
    fn create(dir: &Path, path: PathBuf, spec: ShardSpec, total: u64) -> Result<Self, ModelError> {
        let header = header(&path, &spec.tensors)?;
        let begin = || {
            let mut file = BufWriter::with_capacity(1 << 20, File::create_new(dir.join(&spec.file))?);
            file.write_all(&header).map(|()| file)
        };
        let file = begin().map_err(|e| unwritten(&path, e, total))?;
        Ok(Self { path, file, left: spec.tensors.into() })
    }

    fn write(&mut self, name: &str, bytes: &[u8], total: u64) -> Result<(), ModelError> {
        let expected = self.left.front().map(|tensor| (tensor.name.as_str(), tensor.bytes()));
        if expected != Some((name, bytes.len())) {
            let (tensor, size) = expected.unwrap_or_default();
            let found = bytes.len();
            let problem = format!("expected {tensor} of {size} bytes next, found {name} of {found} bytes");
            return Err(ModelError::malformed(&self.path, problem));
        }
        self.file.write_all(bytes).map_err(|e| unwritten(&self.path, e, total))?;
        self.left.pop_front();
        Ok(())
    }

    fn close(mut self, total: u64) -> Result<(), ModelError> {
        if let Some(next) = self.left.front() {
            let problem =
                format!("expected {} more tensors, {} the next of them", self.left.len(), next.name);
            return Err(ModelError::malformed(&self.path, problem));
        }
        self.file.flush().map_err(|e| unwritten(&self.path, e, total))
    }
}

/// What the system said, and where the disk is too small, how much of it is needed.
pub fn unwritten(path: &Path, error: io::Error, total: u64) -> ModelError {
    let kind = error.kind();
    let too_small = [ErrorKind::StorageFull, ErrorKind::QuotaExceeded, ErrorKind::FileTooLarge];
    if !too_small.contains(&kind) {
        return ModelError::io(path)(error);
    }
    let needed = total as f64 / 1e9;
    let remedy = format!("{error}; all weights take {needed:.2} GB: make room, or choose another disk");
    ModelError::io(path)(io::Error::new(kind, remedy))
}

/// The length of the description, the description, and spaces up to a multiple of eight.
fn header(path: &Path, tensors: &[TensorSpec]) -> Result<Vec<u8>, ModelError> {
    let malformed = |problem: String| ModelError::malformed(path, problem);
    let mut end: usize = 0;
    let mut infos = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let begin = end;
        end = end.saturating_add(tensor.bytes());
        let TensorSpec { name, dtype, shape } = tensor.clone();
        let width = dtype.bitsize().div_ceil(8);
        if !begin.is_multiple_of(width) {
            let problem = format!("{name}: expected a place at a multiple of {width} bytes, found {begin}");
            return Err(malformed(format!("{problem}; wider formats have to come first")));
        }
        infos.push((name, TensorInfo { dtype, shape, data_offsets: (begin, end) }));
    }
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(format), infos).map_err(|e| malformed(e.to_string()))?;
    let mut text = serde_json::to_vec(&metadata).map_err(|e| malformed(e.to_string()))?;
    text.resize(text.len().next_multiple_of(8), b' ');
    Ok([(text.len() as u64).to_le_bytes().as_slice(), &text].concat())
}
