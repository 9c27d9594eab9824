//! What a data file is kept in, found by its first bytes: compression, then the way records follow each other.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flate2::bufread::MultiGzDecoder;
use serde_json::Value;

use super::{Columns, Origin, columnar, csv, json};
use crate::error::DataError;

/// Read at a time; also how far a look at the beginning goes.
const BUFFER: usize = 1 << 18;

/// The bytes that a record of JSON, JSON Lines or CSV may have: a file without an end would be one, and fill all memory.
/// The longest answers in published data have some 100 kB.
pub(super) const MOST_BYTES: usize = 64 << 20;

/// A record before anybody asked what it means.
pub(super) struct Raw {
    /// 1-based line where there are lines.
    pub(super) line: Option<usize>,
    /// The record, or what is wrong with its spelling.
    pub(super) value: Result<Value, String>,
}

/// The records of a file, in order. An error means that nothing after it can be trusted.
pub(super) type Raws = Box<dyn Iterator<Item = Result<Raw, DataError>>>;

/// Decompressed bytes.
pub(super) type Bytes = Box<dyn BufRead>;

/// How records follow each other in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Container {
    JsonArray,
    JsonLines,
    /// With this between two fields.
    Csv(u8),
}

/// Opens `path`. `read` is told how many of the file's bytes have been read.
pub(super) fn open(path: &Path, columns: &Columns, read: &Arc<AtomicU64>) -> Result<Raws, DataError> {
    let Opened { mut bytes, is_packed } = bytes(path, read)?;
    let start = look(&mut bytes, path)?;
    if start.starts_with(columnar::PARQUET) {
        // Its parts are read in an order of their own.
        if is_packed {
            return Err(DataError::PackedParquet { path: path.to_path_buf() });
        }
        return Ok(Box::new(columnar::Table::parquet(path, columns, read)?));
    }
    if start.starts_with(columnar::ARROW_FILE) || start.starts_with(columnar::ARROW_STREAM) {
        return Ok(Box::new(columnar::Table::arrow(path, columns, bytes)?));
    }
    let start = start.strip_prefix(b"\xef\xbb\xbf".as_slice()).unwrap_or(start);
    Ok(match text_container(start, path, columns)? {
        Container::JsonArray => Box::new(json::Array::new(path, bytes)?),
        Container::JsonLines => Box::new(json::Lines::new(path, bytes)),
        Container::Csv(delimiter) => Box::new(csv::Table::new(path, bytes, delimiter)?),
    })
}

/// A file to be read.
pub(super) struct Opened {
    /// Decompressed.
    pub(super) bytes: Bytes,
    /// Whether they had to be.
    is_packed: bool,
}

/// The file's bytes, decompressed.
pub(super) fn bytes(path: &Path, read: &Arc<AtomicU64>) -> Result<Opened, DataError> {
    let io = |source| DataError::io(path, "read the data file")(source);
    let file = File::open(path).map_err(io)?;
    let mut raw = BufReader::with_capacity(BUFFER, Counted { file, read: Arc::clone(read) });
    let magic = raw.fill_buf().map_err(io)?;
    let unpacked: Box<dyn Read> = if magic.starts_with(&[0x1f, 0x8b]) {
        Box::new(MultiGzDecoder::new(raw))
    } else if magic.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        Box::new(zstd::Decoder::with_buffer(raw).map_err(io)?)
    } else {
        return Ok(Opened { bytes: Box::new(raw), is_packed: false });
    };
    Ok(Opened { bytes: Box::new(BufReader::with_capacity(BUFFER, unpacked)), is_packed: true })
}

/// The first bytes, as many as are at hand, without taking them.
fn look<'a>(bytes: &'a mut Bytes, path: &Path) -> Result<&'a [u8], DataError> {
    bytes.fill_buf().map_err(DataError::io(path, "read the data file"))
}

/// Tells an array from lines by the first character. A table has no mark of its own: its first line must name
/// columns that records are made of, unless the file's name says what it is.
fn text_container(start: &[u8], path: &Path, columns: &Columns) -> Result<Container, DataError> {
    match start.iter().find(|byte| !byte.is_ascii_whitespace()) {
        Some(b'[') => return Ok(Container::JsonArray),
        Some(b'{') | None => return Ok(Container::JsonLines),
        Some(_) => {}
    }
    let extension = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_ascii_lowercase();
    let extension = extension.trim_end_matches(".gz").trim_end_matches(".zst");
    let named = match Path::new(extension).extension().and_then(|extension| extension.to_str()) {
        Some("tsv") => Some(b'\t'),
        Some("csv") => Some(b','),
        _ => None,
    };
    for delimiter in [b',', b'\t', b';'] {
        if csv::holds_records(start, delimiter, columns) {
            return Ok(Container::Csv(delimiter));
        }
    }
    match named {
        Some(_) => Err(csv::unknown_columns(path, start)),
        None => Ok(Container::JsonLines),
    }
}

/// What is said of a record beyond [`MOST_BYTES`].
pub(super) fn too_long(path: &Path, record: usize, line: Option<usize>) -> DataError {
    let origin = Origin { file: Arc::from(path), record, line };
    DataError::TooLong { origin, most: MOST_BYTES >> 20 }
}

/// A file that counts what is read from it.
pub(super) struct Counted {
    pub(super) file: File,
    pub(super) read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.file.read(buffer)?;
        self.read.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(bytes)
    }
}
