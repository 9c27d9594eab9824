//! One safetensors file, its tensors computed one after another while it is written.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use pronk_model::HostTensor;
use safetensors::tensor::{Metadata, TensorInfo};

use crate::{Dtype, ExportError};

/// What a file's header says of a tensor.
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its format.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
}

/// Writes `entries` to `path` and returns how many bytes their numbers take. The header is
/// known before the first number is; `tensor` is then asked for one tensor at a time.
///
/// safetensors' own writer takes tensors that cannot fail and makes the file its owner's alone.
pub fn write<'a>(
    path: &Path,
    mut entries: Vec<Entry>,
    mut tensor: impl FnMut(&str) -> Result<HostTensor<'a>, ExportError>,
) -> Result<u64, ExportError> {
    // As safetensors orders them: the widest format first, so that all numbers lie aligned.
    entries.sort_by(|x, y| (y.dtype.bytes(), &x.name).cmp(&(x.dtype.bytes(), &y.name)));
    let file = File::create_new(path).map_err(ExportError::io(path))?;
    let mut file = BufWriter::with_capacity(1 << 20, file);
    file.write_all(&header(path, &entries)?).map_err(ExportError::io(path))?;
    let mut written = 0;
    for entry in &entries {
        let found = tensor(&entry.name)?;
        if (found.dtype, &found.shape) != (entry.dtype.in_file(), &entry.shape) {
            let problem = format!("{}: the tensor is not as the file's header says", entry.name);
            return Err(ExportError::Malformed { path: path.into(), problem });
        }
        file.write_all(&found.bytes).map_err(ExportError::io(path))?;
        written += found.bytes.len() as u64;
    }
    file.flush().map_err(ExportError::io(path))?;
    Ok(written)
}

/// The length of the description, the description, and spaces up to a multiple of eight.
fn header(path: &Path, entries: &[Entry]) -> Result<Vec<u8>, ExportError> {
    let malformed = |problem: String| ExportError::Malformed { path: path.into(), problem };
    let mut end = 0;
    let infos = entries.iter().map(|entry| {
        let begin = end;
        end += entry.shape.iter().product::<usize>() * entry.dtype.bytes();
        let (dtype, shape) = (entry.dtype.in_file(), entry.shape.clone());
        (entry.name.clone(), TensorInfo { dtype, shape, data_offsets: (begin, end) })
    });
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(format), infos.collect()).map_err(|e| malformed(e.to_string()))?;
    let mut text = serde_json::to_vec(&metadata).map_err(|e| malformed(e.to_string()))?;
    text.resize(text.len().next_multiple_of(8), b' ');
    Ok([(text.len() as u64).to_le_bytes().as_slice(), &text].concat())
}
