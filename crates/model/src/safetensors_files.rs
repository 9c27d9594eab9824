//! Weights of a Hugging Face directory: one safetensors file, or shards with an index.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::path::Path;

use safetensors::{Dtype, SafeTensors, tensor::TensorInfo};
use serde::Deserialize;

use crate::base::Shard;
use crate::mapped::{MappedFile, Pages};
use crate::{HostTensor, ModelError};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The mapped files, with every tensor's place.
#[derive(Debug)]
pub struct SafetensorsFiles {
    files: Vec<(String, MappedFile)>,
    /// File, first byte and description by tensor name.
    tensors: BTreeMap<String, (usize, usize, TensorInfo)>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl SafetensorsFiles {
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        let index = dir.join(INDEX);
        if !index.exists() {
            if !dir.join(SINGLE).exists() {
                return Err(ModelError::NoBase {
                    path: dir.into(),
                    problem: format!("expected {SINGLE}, or shards with {INDEX}; found neither"),
                });
            }
            return Self::map_all(dir, vec![SINGLE.to_owned()]);
        }
        let text = fs::read(&index).map_err(ModelError::io(&index))?;
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
            .filter(|(tensor, _)| !files.tensors.contains_key(*tensor))
            .map(|(tensor, file)| format!("{tensor}: the index places it in {file}, which does not hold it"))
            .collect();
        if absent.is_empty() { Ok(files) } else { Err(ModelError::Weights { path: index, problems: absent }) }
    }

    fn map_all(dir: &Path, names: Vec<String>) -> Result<Self, ModelError> {
        let mut all = Self { files: Vec::new(), tensors: BTreeMap::new() };
        for name in names {
            let path = dir.join(&name);
            let mapped = MappedFile::open(&path)?;
            let (start, header) = SafeTensors::read_metadata(&mapped).map_err(|e| broken(&path, &e))?;
            // Checks that the file is as long as its header says.
            SafeTensors::deserialize(&mapped).map_err(|e| broken(&path, &e))?;
            let data = start + size_of::<u64>();
            for (tensor, info) in header.tensors() {
                all.tensors.insert(tensor, (all.files.len(), data, info.clone()));
            }
            all.files.push((name, mapped));
        }
        Ok(all)
    }

    pub fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        self.tensors.iter().map(|(name, (_, _, info))| (name.clone(), info.shape.clone())).collect()
    }

    /// Tensors whose numbers are in no format that the decoder reads.
    pub fn foreign_formats(&self) -> impl Iterator<Item = String> {
        let readable = [Dtype::F32, Dtype::F16, Dtype::BF16];
        self.tensors.iter().filter(move |(_, (_, _, info))| !readable.contains(&info.dtype)).map(
            |(name, (_, _, info))| {
                format!("{name}: expected float32, float16 or bfloat16, found {:?}", info.dtype)
            },
        )
    }

    pub fn read(&self, name: &str) -> Option<HostTensor<'_>> {
        let (file, range, info) = self.place(name)?;
        let bytes = Cow::Borrowed(file.get(range)?);
        Some(HostTensor { dtype: info.dtype, shape: info.shape.clone(), bytes })
    }

    /// A tensor's bytes where they lie, and what they are.
    pub fn pages(&self, name: &str) -> Option<(Pages, Dtype, &[usize])> {
        let (file, range, info) = self.place(name)?;
        Some((file.pages(range)?, info.dtype, &info.shape))
    }

    fn place(&self, name: &str) -> Option<(&MappedFile, Range<usize>, &TensorInfo)> {
        let (file, data, info) = self.tensors.get(name)?;
        let (begin, end) = info.data_offsets;
        Some((&self.files.get(*file)?.1, data + begin..data + end, info))
    }

    pub fn shards(&self) -> Vec<Shard> {
        let names = |file: usize| {
            self.tensors.iter().filter(move |(_, t)| t.0 == file).map(|(name, _)| name.clone()).collect()
        };
        let files = self.files.iter().enumerate();
        files.map(|(i, (file, _))| Shard { file: file.clone(), tensors: names(i) }).collect()
    }
}

fn broken(path: &Path, error: &safetensors::SafeTensorError) -> ModelError {
    ModelError::malformed(
        path,
        format!("not a whole safetensors file ({error}); if it was downloaded, download it again"),
    )
}
