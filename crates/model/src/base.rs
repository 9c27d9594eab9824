use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use pronk_kernels::{Format, FrozenMatrix};
use safetensors::Dtype;
use serde_json::{Map, Value};

use crate::bitsandbytes::{stored_scheme, stored_skip_modules};
use crate::config::{EMBEDDINGS, HEAD};
use crate::mapped::Pages;
use crate::safetensors_files::SafetensorsFiles;
use crate::weights_writer::{ShardSpec, TensorSpec};
use crate::{DecoderConfig, GgufFile, HostTensor, ModelError, Scheme};

/// A frozen base on the disk: opened, mapped, and checked against its configuration.
#[derive(Debug)]
pub struct Base {
    /// The directory or the GGUF file.
    pub path: PathBuf,
    /// What the decoder looks like.
    pub config: DecoderConfig,
    weights: Weights,
    skip_modules: Vec<String>,
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
            let text = pronk_files::read_text(&file).map_err(ModelError::io(&file))?;
            let config = DecoderConfig::from_json(&text)
                .map_err(|problems| ModelError::Unsupported { path: file, problems })?;
            let mut files = SafetensorsFiles::open(path)?;
            if let Some(scheme) = scheme_of(&text) {
                files.gather(scheme);
            }
            let skip_modules = json_of(&text).map_or(Vec::new(), |config| stored_skip_modules(&config));
            Self { path: path.into(), config, weights: Weights::Safetensors(files), skip_modules }
        } else if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) && path.exists() {
            let (file, config) = GgufFile::open(path)?;
            Self { path: path.into(), config, weights: Weights::Gguf(file), skip_modules: Vec::new() }
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

    /// One tensor in its own format; what is quantized, and all of a GGUF file, as float32.
    pub fn read(&self, name: &str) -> Result<HostTensor<'_>, ModelError> {
        let found = match &self.weights {
            Weights::Safetensors(files) => files.read(name).map(Ok),
            Weights::Gguf(file) => file.read(name),
        };
        found.unwrap_or_else(|| Err(self.wrong(format!("{name}: missing"))))
    }

    /// A matrix as it lies on the disk, mapped, not read; quantized numbers stay quantized. Only
    /// what is kept in one of llama.cpp's formats that has no products becomes float32 in memory.
    pub fn matrix(&self, name: &str) -> Result<FrozenMatrix, ModelError> {
        let found = match &self.weights {
            Weights::Safetensors(files) => files.matrix(name),
            Weights::Gguf(file) => file.matrix(name),
        };
        let matrix = if let Some(matrix) = found {
            matrix
        } else {
            let host = self.read(name)?;
            let &[rows, cols] = &host.shape[..] else {
                return Err(self.wrong(format!("{name}: expected a matrix, found shape {:?}", host.shape)));
            };
            let values = Bytes::from(host.cast(Dtype::F32).bytes.into_owned());
            FrozenMatrix::dense(Format::F32, [rows, cols], values)
        };
        matrix.map_err(|e| self.wrong(format!("{name}: {e}")))
    }

    fn wrong(&self, problem: String) -> ModelError {
        ModelError::Weights { path: self.path.clone(), problems: vec![problem] }
    }

    /// Where a tensor lies in mapped files; nothing where it was read into memory instead.
    pub(crate) fn pages(&self, name: &str) -> Vec<Pages> {
        match &self.weights {
            Weights::Safetensors(files) => files.pages(name),
            Weights::Gguf(file) => file.pages(name).into_iter().collect(),
        }
    }

    /// The formats that the linear layers of the blocks are quantized in, such as `nf4` or
    /// `Q4_K, Q6_K`; `None` where none is quantized.
    pub fn quantization(&self) -> Option<String> {
        let names = self.config.linear_modules().into_iter().map(|module| format!("{}.weight", module.name));
        let formats: BTreeSet<String> = names.filter_map(|name| self.quantization_of(&name)).collect();
        (!formats.is_empty()).then(|| formats.into_iter().collect::<Vec<_>>().join(", "))
    }

    fn quantization_of(&self, name: &str) -> Option<String> {
        match &self.weights {
            Weights::Safetensors(files) => files.quantization(name).map(|format| format.to_string()),
            Weights::Gguf(file) => file.quantization(name),
        }
    }

    /// Whether the matrix called `name` is quantized.
    pub(crate) fn is_quantized(&self, name: &str) -> bool {
        self.quantization_of(name).is_some()
    }

    /// Of a quantized base, the linear layers that were left as they were, as its `config.json` names them.
    pub fn skip_modules(&self) -> &[String] {
        &self.skip_modules
    }

    /// What a user should know about this base, if there is anything.
    pub fn note(&self) -> Option<String> {
        self.gguf().and_then(GgufFile::note)
    }

    /// Shapes of all tensors that the base holds, by name.
    pub fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        match &self.weights {
            Weights::Safetensors(files) => files.shapes(),
            Weights::Gguf(file) => file.shapes(),
        }
    }

    /// The files of the checkpoint, or those that a GGUF, a quantized or a PyTorch base would become:
    /// of about `shard_bytes` each when its numbers take `bytes_per_number`.
    pub fn shards(&self, shard_bytes: usize, bytes_per_number: usize) -> Vec<Shard> {
        match &self.weights {
            Weights::Safetensors(files) if !files.is_quantized() && !files.are_pytorch() => files.shards(),
            _ => {
                let spec = |(name, shape)| TensorSpec { name, dtype: Dtype::F32, shape };
                let tensors = self.shapes().into_iter().map(spec).collect();
                let name = |tensor: TensorSpec| tensor.name;
                ShardSpec::split(tensors, shard_bytes / bytes_per_number * size_of::<f32>())
                    .into_iter()
                    .map(|ShardSpec { file, tensors }| Shard {
                        file,
                        tensors: tensors.into_iter().map(name).collect(),
                    })
                    .collect()
            }
        }
    }

    /// Compares names and shapes with what the configuration asks for; lists every difference.
    fn check(&self) -> Result<(), ModelError> {
        let mut found = self.shapes();
        let mut problems = match &self.weights {
            Weights::Safetensors(files) => files.problems().collect(),
            Weights::Gguf(_) => Vec::new(),
        };
        for (name, expected) in self.config.tensors() {
            match found.remove(&name) {
                None if self.is_broken(&name) => {} // told above, with what is wrong with its parts
                None => problems.push(format!("{name}: missing, expected shape {expected:?}")),
                Some(shape) if shape != expected => {
                    problems.push(format!("{name}: expected shape {expected:?}, found {shape:?}"));
                }
                Some(_) => {}
            }
        }
        let tied_head = |name: &str| self.config.tie_word_embeddings && name == HEAD;
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

    fn is_broken(&self, name: &str) -> bool {
        matches!(&self.weights, Weights::Safetensors(files) if files.is_broken(name))
    }

    /// What the checkpoint is kept in, as its first tensor tells; float32, which holds what was
    /// quantized, for quantized ones and GGUF files.
    pub fn dtype(&self) -> Dtype {
        match &self.weights {
            Weights::Safetensors(files) if !files.is_quantized() => {
                files.dtype(EMBEDDINGS).unwrap_or(Dtype::F32)
            }
            _ => Dtype::F32,
        }
    }

    /// The format in which [`Base::read`] gives the tensor called `name`, without reading it.
    pub fn dtype_of(&self, name: &str) -> Result<Dtype, ModelError> {
        let found = match &self.weights {
            Weights::Safetensors(files) => files.dtype(name),
            Weights::Gguf(file) => file.shapes().contains_key(name).then_some(Dtype::F32),
        };
        found.ok_or_else(|| self.wrong(format!("{name}: missing")))
    }

    /// The weight files, and what stands in each in front of the first tensor's numbers.
    pub(crate) fn headers(&self) -> Vec<(PathBuf, &[u8])> {
        match &self.weights {
            Weights::Safetensors(files) => {
                files.headers().map(|(name, header)| (self.path.join(name), header)).collect()
            }
            Weights::Gguf(file) => vec![(self.path.clone(), file.header())],
        }
    }
}

/// How the weights beside this `config.json`, which has been checked, are quantized.
fn scheme_of(config: &[u8]) -> Option<Scheme> {
    stored_scheme(&json_of(config)?).ok()?
}

fn json_of(config: &[u8]) -> Option<Map<String, Value>> {
    serde_json::from_slice(config).ok()
}
