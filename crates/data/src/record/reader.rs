//! The records of one file, as they come.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::container::{self, Opened, Raw, Raws};
use super::{Columns, Origin, Record, RecordFormat};
use crate::error::DataError;

/// How many records are looked at to find their format.
const FIRST: usize = 16;

/// A record with its place.
#[derive(Debug)]
pub struct Found {
    /// Where it stands.
    pub origin: Origin,
    /// The record and the names of its fields that are of no use, or what is wrong with it.
    pub record: Result<(Record, Vec<String>), String>,
}

/// Reads a file's records one after the other, in bounded memory.
pub struct RecordReader {
    file: Arc<Path>,
    format: RecordFormat,
    columns: Columns,
    /// Those that were looked at.
    first: VecDeque<Raw>,
    rest: Raws,
    records: usize,
    read: Arc<AtomicU64>,
}

impl RecordReader {
    /// Opens `path`, finds what it is kept in, and unless `format` says it, what its records look like.
    pub fn open(path: &Path, format: RecordFormat, columns: &Columns) -> Result<Self, DataError> {
        let read = Arc::default();
        let mut rest = container::open(path, columns, &read)?;
        let mut first = VecDeque::new();
        for raw in rest.by_ref().take(FIRST) {
            first.push_back(raw?);
        }
        if first.is_empty() {
            return Err(nothing_in(path));
        }
        let values = first.iter().filter_map(|raw: &Raw| raw.value.as_ref().ok());
        let format = match format {
            RecordFormat::Auto => RecordFormat::of(values, columns),
            given => given,
        };
        let columns = columns.clone();
        Ok(Self { file: Arc::from(path), format, columns, first, rest, records: 0, read })
    }

    /// The format of the records, found or given.
    pub fn format(&self) -> RecordFormat {
        self.format
    }

    /// Bytes read of the file so far.
    pub fn bytes_read(&self) -> u64 {
        self.read.load(std::sync::atomic::Ordering::Relaxed)
    }
}

/// A file without a record: of nothing at all, or an empty list or table.
fn nothing_in(path: &Path) -> DataError {
    let path = path.to_path_buf();
    let blank = container::bytes(&path, &Arc::default()).is_ok_and(|Opened { mut bytes, .. }| {
        bytes.fill_buf().is_ok_and(|start| {
            let start = start.strip_prefix(b"\xef\xbb\xbf".as_slice()).unwrap_or(start);
            start.iter().all(u8::is_ascii_whitespace)
        })
    });
    if blank { DataError::EmptyFile { path } } else { DataError::NoRecords { path } }
}

impl Iterator for RecordReader {
    type Item = Result<Found, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        let raw = match self.first.pop_front() {
            Some(raw) => Ok(raw),
            None => self.rest.next()?,
        };
        Some(raw.map(|Raw { line, value }| {
            self.records += 1;
            let origin = Origin { file: Arc::clone(&self.file), record: self.records, line };
            let record = value.and_then(|value| self.format.parse(value, &self.columns));
            Found { origin, record }
        }))
    }
}
