use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use pronk_kernels::{Format, FrozenError, FrozenMatrix};
use safetensors::Dtype;

use crate::mapped::Pages;
use crate::safetensors_files::SafetensorsFiles;
use crate::{DecoderConfig, GgufFile, HostTensor, ModelError};

/// A frozen base on the disk: opened, mapped, and checked against its configuration.
#[derive(Debug)]
pub struct Base {
    /// The directory or the GGUF file.
    pub path: PathBuf,
    /// What the decoder looks like.
    pub config: DecoderConfig,
    weights: Weights,
}

#[derive(Debug)]
enum Weights {
    Safetensors(SafetensorsFiles),
    Gguf(GgufFile),
}

/// A file of a checkpoint and the tensors in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    /// Its file name.
    pub file: String,
    /// Names of its tensors.
    pub tensors: Vec<String>,
}

/// Tensors that old checkpoints carry and no decoder reads.
const IGNORED: &str = "rotary_emb.inv_freq";

impl Base {
    /// Opens a Hugging Face directory or a GGUF file. No weights are read beyond headers.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let base = if path.is_dir() {
            let file = path.join("config.json");
            let text = fs::read(&file).map_err(ModelError::io(&file))?;
            let config = DecoderConfig::from_json(&text)
                .map_err(|problems| ModelError::Unsupported { path: file, problems })?;
            let weights = Weights::Safetensors(SafetensorsFiles::open(path)?);
            Self { path: path.into(), config, weights }
        } else if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) && path.exists() {
            let (file, config) = GgufFile::open(path)?;
            Self { path: path.into(), config, weights: Weights::Gguf(file) }
        } else {
            let found = if path.exists() { "another kind of file" } else { "nothing" };
            return Err(ModelError::NoBase {
                path: path.into(),
                problem: format!("expected a Hugging Face directory or a .gguf file, found {found}"),
            });
        };
        base.check()?;
        Ok(base)
    }

    /// The GGUF file, where the base is one.
    pub fn gguf(&self) -> Option<&GgufFile> {
        match &self.weights {
            Weights::Gguf(file) => Some(file),
            Weights::Safetensors(_) => None,
        }
    }

    /// One tensor in its own format; GGUF's are dequantized to float32.
    pub fn read(&self, name: &str) -> Result<HostTensor<'_>, ModelError> {
        let found = match &self.weights {
            Weights::Safetensors(files) => files.read(name).map(Ok),
            Weights::Gguf(file) => file.read(name),
        };
        found.unwrap_or_else(|| {
            Err(ModelError::Weights { path: self.path.clone(), problems: vec![format!("{name}: missing")] })
        })
    }

    /// A matrix as it lies on the disk, mapped, not read; quantized numbers stay quantized.
    pub fn matrix(&self, name: &str) -> Result<FrozenMatrix, ModelError> {
        if let Weights::Safetensors(files) = &self.weights
            && let Some((pages, dtype, &[rows, cols])) = files.pages(name)
            && let Some(format) = dense_format(dtype)
        {
            return self.frozen(name, FrozenMatrix::dense(format, [rows, cols], pages.bytes()));
        }
        let host = self.read(name)?;
        let &[rows, cols] = &host.shape[..] else {
            let problem = format!("{name}: expected a matrix, found shape {:?}", host.shape);
            return Err(ModelError::Weights { path: self.path.clone(), problems: vec![problem] });
        };
        let values = Bytes::from(host.cast(Dtype::F32).bytes.into_owned());
        self.frozen(name, FrozenMatrix::dense(Format::F32, [rows, cols], values))
    }

    fn frozen(
        &self,
        name: &str,
        matrix: Result<FrozenMatrix, FrozenError>,
    ) -> Result<FrozenMatrix, ModelError> {
        matrix.map_err(|e| ModelError::Weights { path: self.path.clone(), problems: vec![format!("{name}: {e}")] })
    }

    /// Where a tensor lies in a mapped file; nothing where it was read into memory instead.
    pub(crate) fn pages(&self, name: &str) -> Option<Pages> {
        match &self.weights {
            Weights::Safetensors(files) => files.pages(name).map(|(pages, ..)| pages),
            Weights::Gguf(_) => None,
        }
    }

    /// Shapes of all tensors that the base holds, by name.
    pub fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        match &self.weights {
            Weights::Safetensors(files) => files.shapes(),
            Weights::Gguf(file) => file.shapes(),
        }
    }

    /// The files of the checkpoint, or those that a GGUF base would become: of about
    /// `shard_bytes` each when its numbers take `bytes_per_number`.
    pub fn shards(&self, shard_bytes: usize, bytes_per_number: usize) -> Vec<Shard> {
        match &self.weights {
            Weights::Safetensors(files) => files.shards(),
            Weights::Gguf(file) => split(file.shapes(), shard_bytes / bytes_per_number),
        }
    }

    /// Compares names and shapes with what the configuration asks for; lists every difference.
    fn check(&self) -> Result<(), ModelError> {
        let mut found = self.shapes();
        let mut problems = match &self.weights {
            Weights::Safetensors(files) => files.foreign_formats().collect(),
            Weights::Gguf(_) => Vec::new(),
        };
        for (name, expected) in self.config.tensors() {
            match found.remove(&name) {
                None => problems.push(format!("{name}: missing, expected shape {expected:?}")),
                Some(shape) if shape != expected => {
                    problems.push(format!("{name}: expected shape {expected:?}, found {shape:?}"));
                }
                Some(_) => {}
            }
        }
        let tied_head = |name: &str| self.config.tie_word_embeddings && name == "lm_head.weight";
        let surplus = found.iter().filter(|(name, _)| !name.ends_with(IGNORED) && !tied_head(name));
        problems.extend(surplus.map(|(name, shape)| {
            format!("{name}: surplus, shape {shape:?}; the decoder has no place for it")
        }));
        if problems.is_empty() {
            Ok(())
        } else {
            Err(ModelError::Weights { path: self.path.clone(), problems })
        }
    }

    /// Bytes per number in the base's first tensor: what its checkpoint is kept in.
    pub fn dtype(&self) -> Dtype {
        match &self.weights {
            Weights::Safetensors(files) => {
                files.read("model.embed_tokens.weight").map_or(Dtype::F32, |t| t.dtype)
            }
            Weights::Gguf(_) => Dtype::F32,
        }
    }
}

fn dense_format(dtype: Dtype) -> Option<Format> {
    match dtype {
        Dtype::F32 => Some(Format::F32),
        Dtype::F16 => Some(Format::F16),
        Dtype::BF16 => Some(Format::Bf16),
        _ => None,
    }
}

/// Consecutive tensors, of about `limit` numbers a shard.
fn split(shapes: BTreeMap<String, Vec<usize>>, limit: usize) -> Vec<Shard> {
    let mut groups: Vec<Vec<String>> = vec![Vec::new()];
    let mut numbers = 0;
    for (name, shape) in shapes {
        let n: usize = shape.iter().product();
        if numbers > 0 && numbers + n > limit {
            groups.push(Vec::new());
            numbers = 0;
        }
        numbers += n;
        if let Some(group) = groups.last_mut() {
            group.push(name);
        }
    }
    let count = groups.len();
    let file = |i: usize| match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
    };
    groups.into_iter().enumerate().map(|(i, tensors)| Shard { file: file(i), tensors }).collect()
}
