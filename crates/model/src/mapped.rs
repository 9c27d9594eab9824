use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::ModelError;

/// A file's bytes, read from the disk when they are first touched.
pub fn map(path: &Path) -> Result<Mmap, ModelError> {
    let file = File::open(path).map_err(ModelError::io(path))?;
    // SAFETY: the mapping is read-only. If another process cuts the file short while it is
    // mapped, reading past its new end kills this one; checkpoints are not written to in place,
    // and copying tens of gigabytes to rule it out is what mapping is there to avoid.
    #[allow(unsafe_code)]
    let mapped = unsafe { Mmap::map(&file) };
    mapped.map_err(ModelError::io(path))
}
