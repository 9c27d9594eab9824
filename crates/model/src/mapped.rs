//! Files of a base, mapped: their bytes are read from the disk when they are first touched, and
//! the system may drop them again whenever it needs the memory.

use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use memmap2::{Advice, Mmap, UncheckedAdvice};

use crate::ModelError;

/// A mapped file, shared by everything that is read from it.
#[derive(Debug, Clone)]
pub struct MappedFile(Arc<Mmap>);

impl MappedFile {
    /// The file at `path`, which may be a link to wherever it is.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        Self::of(path, File::open(path))
    }

    /// A file of a folder that it may not lead out of.
    pub fn in_folder(path: &Path) -> Result<Self, ModelError> {
        Self::of(path, pronk_files::open(path))
    }

    fn of(path: &Path, file: io::Result<File>) -> Result<Self, ModelError> {
        let file = file.map_err(ModelError::io(path))?;
        // SAFETY: the mapping is read-only. If another process cuts the file short while it is
        // mapped, reading past its new end kills this one; checkpoints are not written to in place,
        // and copying tens of gigabytes to rule it out is what mapping is there to avoid.
        #[allow(unsafe_code)]
        let mapped = unsafe { Mmap::map(&file) };
        mapped.map(|map| Self(Arc::new(map))).map_err(ModelError::io(path))
    }

    /// A part of the file; `None` where the file ends before it does.
    pub fn pages(&self, range: Range<usize>) -> Option<Pages> {
        self.0.get(range.clone())?;
        Some(Pages { file: self.clone(), range })
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

/// A part of a mapped file, as one tensor takes it up.
#[derive(Debug, Clone)]
pub struct Pages {
    file: MappedFile,
    range: Range<usize>,
}

impl Pages {
    /// The bytes, without a copy.
    pub fn bytes(&self) -> Bytes {
        Bytes::from_owner(self.file.clone()).slice(self.range.clone())
    }

    /// Asks the system to read the part from the disk into its cache. Returns at once or when the
    /// reads are under way, whichever the system likes.
    pub fn read_ahead(&self) {
        // Only advice: a system that cannot take it reads when the bytes are touched.
        let _ = self.file.0.advise_range(Advice::WillNeed, self.range.start, self.range.len());
    }

    /// Takes the part out of this process' memory. It stays in the system's cache while there is
    /// room, and is read again when it is touched.
    pub fn release(&self) {
        // SAFETY: a read-only mapping of a file gets the same bytes from the file again.
        #[allow(unsafe_code)]
        let _ = unsafe {
            self.file.0.unchecked_advise_range(UncheckedAdvice::DontNeed, self.range.start, self.range.len())
        };
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::reversed_empty_ranges)]
mod tests {
    use super::*;

    /// A mapped file of some length, and what is in it.
    fn mapped(length: usize) -> (MappedFile, Vec<u8>) {
        let written: Vec<u8> = (0..length).map(|i| (i * 7 + i / 256) as u8).collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &written).unwrap();
        (MappedFile::open(file.path()).unwrap(), written)
    }

    /// Parts that begin and end within pages of the system's, the last with the file.
    #[test]
    fn parts_are_read_again_after_they_are_released() {
        let (file, written) = mapped(5 * 4096 + 100);
        for range in [0..1, 0..4096, 4095..4097, 5000..20_000, 20_479..20_580, 20_580..20_580] {
            let pages = file.pages(range.clone()).unwrap();
            pages.read_ahead();
            let bytes = pages.bytes();
            assert_eq!(bytes, written[range.clone()]);
            pages.release();
            assert_eq!(bytes, written[range]);
        }
        assert_eq!(*file, *written);
    }

    #[test]
    fn parts_keep_the_file_mapped() {
        let (file, written) = mapped(10_000);
        let bytes = file.pages(100..9000).unwrap().bytes();
        drop(file);
        assert_eq!(bytes, written[100..9000]);
    }

    #[test]
    fn there_are_no_parts_behind_the_end() {
        let (file, _) = mapped(10_000);
        for range in [9999..10_001, 10_001..10_001, usize::MAX - 1..usize::MAX, 2..1] {
            assert!(file.pages(range).is_none());
        }
        let (empty, _) = mapped(0);
        let pages = empty.pages(0..0).unwrap();
        pages.read_ahead();
        pages.release();
        assert!(pages.bytes().is_empty() && empty.pages(0..1).is_none());
    }
}
