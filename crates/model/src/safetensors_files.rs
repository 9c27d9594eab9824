//! Weights of a Hugging Face directory: one file, or shards with an index; safetensors, or where
//! there are none, PyTorch's own.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use pronk_kernels::{Format, FrozenError, FrozenMatrix};
use safetensors::{Dtype, SafeTensors, tensor::TensorInfo};
use serde::Deserialize;

use crate::base::Shard;
use crate::bitsandbytes::{self, StoredMatrix};
use crate::mapped::{MappedFile, Pages};
use crate::pytorch_file::{self, PytorchFile};
use crate::{HostTensor, ModelError, Scheme};

/// A single file and the index of shards, by preference.
const KINDS: [(&str, &str); 2] = [
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
];

/// The mapped files, with every tensor's place.
#[derive(Debug)]
pub struct SafetensorsFiles {
    files: Vec<File>,
    /// File, first byte and description by tensor name.
    tensors: BTreeMap<String, (usize, usize, TensorInfo)>,
    /// Matrices that several tensors make up, and what is wrong with those that could not be.
    quantized: BTreeMap<String, Result<StoredMatrix, Vec<String>>>,
}

#[derive(Debug)]
struct File {
    name: String,
    mapped: MappedFile,
    /// What says where the tensors lie.
    header: Range<usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl SafetensorsFiles {
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        let there = |name: &str| dir.join(name).exists();
        let Some((single, index)) = KINDS.into_iter().find(|(single, index)| there(single) || there(index))
        else {
            let [(single, index), (other, _)] = KINDS;
            return Err(ModelError::NoBase {
                path: dir.into(),
                problem: format!("expected {single}, or shards with {index}; found neither, nor a {other}"),
            });
        };
        let index = dir.join(index);
        if !index.exists() {
            return Self::map_all(dir, vec![single.to_owned()]);
        }
        let text = pronk_files::read_text(&index).map_err(ModelError::io(&index))?;
        let Index { weight_map } =
            serde_json::from_slice(&text).map_err(|e| ModelError::malformed(&index, e.to_string()))?;
        let names: BTreeSet<String> = weight_map.values().cloned().collect();
        if let Some(name) = names.iter().find(|n| Path::new(n).file_name() != Some(n.as_ref())) {
            return Err(ModelError::malformed(
                &index,
                format!("the shard name '{name}' leaves the directory; expected a plain file name"),
            ));
        }
        let files = Self::map_all(dir, names.into_iter().collect())?;
        let absent: Vec<String> = weight_map
            .iter()
            .filter(|(tensor, _)| !files.has(tensor))
            .map(|(tensor, file)| format!("{tensor}: the index places it in {file}, which does not hold it"))
            .collect();
        if absent.is_empty() { Ok(files) } else { Err(ModelError::Weights { path: index, problems: absent }) }
    }

    fn map_all(dir: &Path, names: Vec<String>) -> Result<Self, ModelError> {
        let mut all = Self { files: Vec::new(), tensors: BTreeMap::new(), quantized: BTreeMap::new() };
        for name in names {
            let path = dir.join(&name);
            let mapped = MappedFile::in_folder(&path)?;
            let number = all.files.len();
            let header = if is_pytorch(&name) {
                let PytorchFile { pickle, tensors } = pytorch_file::read(&path, &mapped)?;
                let tensors = tensors.into_iter().map(|(name, start, info)| (name, (number, start, info)));
                all.tensors.extend(tensors);
                pickle
            } else {
                let (start, header) = SafeTensors::read_metadata(&mapped).map_err(|e| broken(&path, &e))?;
                // Checks that the file is as long as its header says.
                SafeTensors::deserialize(&mapped).map_err(|e| broken(&path, &e))?;
                let data = start + size_of::<u64>();
                for (tensor, info) in header.tensors() {
                    all.tensors.insert(tensor, (number, data, info.clone()));
                }
                0..data
            };
            all.files.push(File { name, mapped, header });
        }
        Ok(all)
    }

    /// Whether these are PyTorch's own files, which nothing new is written as.
    pub fn are_pytorch(&self) -> bool {
        self.files.iter().any(|file| is_pytorch(&file.name))
    }

    /// Puts matrices quantized to `scheme` together. From then on the tensors that make up a matrix
    /// stand under its name alone.
    pub fn gather(&mut self, scheme: Scheme) {
        let (codes, beside) = match scheme {
            Scheme::Nf4 => (Dtype::U8, bitsandbytes::QUANT_STATE),
            Scheme::Int8 => (Dtype::I8, bitsandbytes::SCB),
        };
        let quantized = |name: &str, info: &TensorInfo| {
            let module = name.strip_suffix(".weight")?;
            let before = if scheme == Scheme::Nf4 { name } else { module };
            (info.dtype == codes || self.has(&format!("{before}{beside}"))).then(|| name.to_owned())
        };
        let names: Vec<String> =
            self.tensors.iter().filter_map(|(name, (_, _, info))| quantized(name, info)).collect();
        for name in names {
            let matrix = bitsandbytes::gather(scheme, &name, self);
            self.quantized.insert(name, matrix);
        }
    }

    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The shape of a tensor of the files.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(|(_, _, info)| info.shape.clone())
    }

    /// Takes a tensor out of the list.
    pub fn take(&mut self, name: &str) -> Option<(Pages, Dtype)> {
        let (file, range, info) = self.place(name)?;
        let taken = (file.pages(range)?, info.dtype);
        self.tensors.remove(name);
        Some(taken)
    }

    pub fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let whole = self.tensors.iter().map(|(name, (_, _, info))| (name.clone(), info.shape.clone()));
        let made_up = self.quantized.iter();
        let made_up =
            made_up.filter_map(|(name, m)| Some((name.clone(), m.as_ref().ok()?.matrix.shape().to_vec())));
        whole.chain(made_up).collect()
    }

    /// Tensors whose numbers are in no format that the decoder reads, and what is wrong with
    /// quantized matrices.
    pub fn problems(&self) -> impl Iterator<Item = String> {
        let readable = [Dtype::F32, Dtype::F16, Dtype::BF16];
        let foreign =
            self.tensors.iter().filter(move |(_, (_, _, info))| !readable.contains(&info.dtype)).map(
                |(name, (_, _, info))| {
                    format!("{name}: expected float32, float16 or bfloat16, found {:?}", info.dtype)
                },
            );
        foreign.chain(self.quantized.values().filter_map(|m| m.as_ref().err()).flatten().cloned())
    }

    /// Whether the matrix called `name` could not be put together.
    pub fn is_broken(&self, name: &str) -> bool {
        self.quantized.get(name).is_some_and(Result::is_err)
    }

    /// The format of a quantized matrix.
    pub fn quantization(&self, name: &str) -> Option<Format> {
        self.stored(name).map(|stored| stored.matrix.format())
    }

    /// Whether any matrix is quantized.
    pub fn is_quantized(&self) -> bool {
        !self.quantized.is_empty()
    }

    /// The format that [`SafetensorsFiles::read`] gives a tensor in.
    pub fn dtype(&self, name: &str) -> Option<Dtype> {
        let whole = self.tensors.get(name).map(|(_, _, info)| info.dtype);
        whole.or_else(|| self.stored(name).map(|_| Dtype::F32))
    }

    /// A tensor in its own format; a quantized matrix dequantized to float32.
    pub fn read(&self, name: &str) -> Option<HostTensor<'_>> {
        if let Some(stored) = self.stored(name) {
            return Some(HostTensor::dequantized(&stored.matrix));
        }
        let (file, range, info) = self.place(name)?;
        let bytes = Cow::Borrowed(file.get(range)?);
        Some(HostTensor { dtype: info.dtype, shape: info.shape.clone(), bytes })
    }

    /// A matrix where it lies, in its own format. `None` for what is no matrix.
    pub fn matrix(&self, name: &str) -> Option<Result<FrozenMatrix, FrozenError>> {
        if let Some(stored) = self.stored(name) {
            return Some(Ok(stored.matrix.clone()));
        }
        let (file, range, info) = self.place(name)?;
        let format = match info.dtype {
            Dtype::F32 => Format::F32,
            Dtype::F16 => Format::F16,
            Dtype::BF16 => Format::Bf16,
            _ => return None,
        };
        let &[rows, cols] = &info.shape[..] else { return None };
        Some(FrozenMatrix::dense(format, [rows, cols], file.pages(range)?.bytes()))
    }

    /// Where a tensor's bytes lie.
    pub fn pages(&self, name: &str) -> Vec<Pages> {
        match self.stored(name) {
            Some(stored) => stored.pages.clone(),
            None => self.place(name).and_then(|(file, range, _)| file.pages(range)).into_iter().collect(),
        }
    }

    fn stored(&self, name: &str) -> Option<&StoredMatrix> {
        self.quantized.get(name)?.as_ref().ok()
    }

    fn place(&self, name: &str) -> Option<(&MappedFile, Range<usize>, &TensorInfo)> {
        let (file, data, info) = self.tensors.get(name)?;
        let (begin, end) = info.data_offsets;
        Some((&self.files.get(*file)?.mapped, data + begin..data + end, info))
    }

    pub fn shards(&self) -> Vec<Shard> {
        let names = |file: usize| {
            self.tensors.iter().filter(move |(_, t)| t.0 == file).map(|(name, _)| name.clone()).collect()
        };
        let files = self.files.iter().enumerate();
        files.map(|(i, file)| Shard { file: file.name.clone(), tensors: names(i) }).collect()
    }

    /// The files' names, and what in each says where the tensors lie.
    pub fn headers(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.files
            .iter()
            .map(|file| (file.name.as_str(), file.mapped.get(file.header.clone()).unwrap_or(&file.mapped)))
    }
}

fn is_pytorch(name: &str) -> bool {
    Path::new(name).extension().is_some_and(|extension| extension == "bin")
}

fn broken(path: &Path, error: &safetensors::SafeTensorError) -> ModelError {
    ModelError::malformed(
        path,
        format!("not a whole safetensors file ({error}); if it was downloaded, download it again"),
    )
}
