//! Tables of text: the first row names the columns.

use std::io::{self, BufRead, Read};
use std::path::{Path, PathBuf};

use ::csv::{ErrorKind, Reader, ReaderBuilder, StringRecord};
use serde_json::Value;

use super::container::{Bytes, MOST_BYTES, Raw, too_long};
use super::{Columns, RecordFormat};
use crate::error::DataError;

/// A table's rows as objects of strings.
pub(super) struct Table {
    path: PathBuf,
    header: StringRecord,
    reader: Reader<Bounded>,
    records: usize,
    done: bool,
}

/// Bytes of which a row takes no more than [`MOST_BYTES`] and what its reader has read ahead.
struct Bounded {
    bytes: Bytes,
    /// For the row at hand.
    left: usize,
}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let found = self.bytes.fill_buf()?;
        if self.left == 0 && !found.is_empty() {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let taken = found.take(self.left as u64).read(buffer)?;
        self.bytes.consume(taken);
        self.left -= taken;
        Ok(taken)
    }
}

impl Table {
    pub(super) fn new(path: &Path, mut bytes: Bytes, delimiter: u8) -> Result<Self, DataError> {
        let bom = bytes.fill_buf().is_ok_and(|start| start.starts_with(b"\xef\xbb\xbf"));
        if bom {
            bytes.consume(3);
        }
        let bytes = Bounded { bytes, left: MOST_BYTES };
        let mut reader = ReaderBuilder::new().delimiter(delimiter).from_reader(bytes);
        let header = reader.headers().map_err(|error| broken(path, error, 1, Some(1)))?.clone();
        Ok(Self { path: path.to_path_buf(), header, reader, records: 0, done: false })
    }
}

impl Iterator for Table {
    type Item = Result<Raw, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let line = Some(self.reader.position().line() as usize);
        self.reader.get_mut().left = MOST_BYTES;
        self.records += 1;
        let mut row = StringRecord::new();
        Some(match self.reader.read_record(&mut row) {
            Ok(false) => return None,
            Ok(true) => {
                let line = row.position().map(|place| place.line() as usize);
                let pair = |(name, text): (&str, &str)| (name.to_owned(), Value::from(text));
                let value = self.header.iter().zip(&row).map(pair).collect();
                Ok(Raw { line, value: Ok(Value::Object(value)) })
            }
            Err(error) => {
                if let ErrorKind::UnequalLengths { pos, expected_len, len } = error.kind() {
                    let line = pos.as_ref().map(|place| place.line() as usize).or(line);
                    Ok(Raw { line, value: Err(format!("{len} fields, expected {expected_len}")) })
                } else {
                    self.done = true;
                    Err(broken(&self.path, error, self.records, line))
                }
            }
        })
    }
}

/// `record` and `line` are where the row begins.
fn broken(path: &Path, error: ::csv::Error, record: usize, line: Option<usize>) -> DataError {
    let place = error.position().map(|place| (place.byte(), place.line()));
    match (error.into_kind(), place) {
        (ErrorKind::Io(source), _) if source.kind() == io::ErrorKind::FileTooLarge => {
            too_long(path, record, line)
        }
        (ErrorKind::Io(source), _) => DataError::io(path, "read the data file")(source),
        (ErrorKind::Utf8 { err, .. }, place) => {
            let (byte, line) = place.unwrap_or_default();
            let offset = byte as usize + err.valid_up_to();
            DataError::NotUtf8 { path: path.to_path_buf(), offset, line: line as usize }
        }
        (other, _) => DataError::io(path, "read the data file")(std::io::Error::other(format!("{other:?}"))),
    }
}

/// The names in the first row.
fn names(start: &[u8], delimiter: u8) -> Vec<String> {
    let mut reader = ReaderBuilder::new().delimiter(delimiter).from_reader(start);
    reader.headers().map(|header| header.iter().map(str::to_owned).collect()).unwrap_or_default()
}

/// Whether the first row names columns that records are made of.
pub(super) fn holds_records(start: &[u8], delimiter: u8, columns: &Columns) -> bool {
    RecordFormat::of_columns(&names(start, delimiter), columns).is_some()
}

/// What is said of a table whose columns are strangers.
pub(super) fn unknown_columns(path: &Path, start: &[u8]) -> DataError {
    DataError::unknown_columns(path, &names(start, b','))
}
