//! Reading a file whole and writing one so that nobody ever sees half of it.

use std::io::Write;
use std::path::Path;

use atomic_write_file::AtomicWriteFile;
use sha2::{Digest, Sha256};

use crate::error::DataError;

/// The bytes of a file of text that lies in somebody's folder.
pub(crate) fn read(path: &Path, action: &'static str) -> Result<Vec<u8>, DataError> {
    pronk_files::read_text(path).map_err(DataError::io(path, action))
}

/// `bytes` as text; a UTF-8 byte order mark at the front is left off.
pub(crate) fn text<'a>(path: &Path, bytes: &'a [u8]) -> Result<&'a str, DataError> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text.strip_prefix('\u{feff}').unwrap_or(text)),
        Err(error) => {
            let offset = error.valid_up_to();
            let line = 1 + bytes.iter().take(offset).filter(|&&byte| byte == b'\n').count();
            Err(DataError::NotUtf8 { path: path.to_path_buf(), offset, line })
        }
    }
}

/// Writes `parts` one after the other to a temporary file beside `path`, syncs it and renames it to `path`.
pub(crate) fn write_atomically(path: &Path, parts: &[&[u8]], action: &'static str) -> Result<(), DataError> {
    let write = || -> std::io::Result<()> {
        let mut file = AtomicWriteFile::open(path)?;
        for part in parts {
            file.write_all(part)?;
        }
        // `commit` syncs before it renames; without it the temporary file is removed on drop.
        file.commit()
    };
    write().map_err(DataError::io(path, action))
}

/// Lower-case hexadecimal of a finished SHA-256.
pub(crate) fn hex(hasher: Sha256) -> String {
    use std::fmt::Write as _;
    hasher.finalize().iter().fold(String::with_capacity(64), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // writing to a String cannot fail
        text
    })
}

/// Adds a field with its length in front, so that no two lists of fields hash alike.
pub(crate) fn hash_field(hasher: &mut Sha256, bytes: &[u8]) {
    hasher.update((bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}
