//! Tables of text: the first row names the columns.

use std::path::{Path, PathBuf};

use ::csv::{ErrorKind, Reader, ReaderBuilder, StringRecord};
use serde_json::Value;

use super::container::{Bytes, Raw};
use super::{Columns, RecordFormat};
use crate::error::DataError;

/// A table's rows as objects of strings.
pub(super) struct Table {
    path: PathBuf,
    header: StringRecord,
    reader: Reader<Bytes>,
    done: bool,
}

impl Table {
    pub(super) fn new(path: &Path, mut bytes: Bytes, delimiter: u8) -> Result<Self, DataError> {
        let bom = bytes.fill_buf().is_ok_and(|start| start.starts_with(b"\xef\xbb\xbf"));
        if bom {
            bytes.consume(3);
        }
        let mut reader = ReaderBuilder::new().delimiter(delimiter).from_reader(bytes);
        let header = reader.headers().map_err(|error| broken(path, error))?.clone();
        Ok(Self { path: path.to_path_buf(), header, reader, done: false })
    }
}

impl Iterator for Table {
    type Item = Result<Raw, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let line = Some(self.reader.position().line() as usize);
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
                    Err(broken(&self.path, error))
                }
            }
        })
    }
}

fn broken(path: &Path, error: ::csv::Error) -> DataError {
    let place = error.position().map(|place| (place.byte(), place.line()));
    match (error.into_kind(), place) {
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
