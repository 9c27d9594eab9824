//! Tables of columns: Parquet, and Arrow's IPC files and streams. A batch of rows is in memory at a time.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use ::parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader};
use ::parquet::arrow::{ProjectionMask, parquet_to_arrow_field_levels};
use arrow_array::{Array, RecordBatch};
use arrow_buffer::Buffer;
use arrow_cast::cast;
use arrow_ipc::reader::StreamDecoder;
use arrow_json::WriterBuilder;
use arrow_json::writer::LineDelimited;
use arrow_schema::{ArrowError, DataType, Schema};
use serde_json::Value;

use super::container::{Bytes, Raw};
use super::pages::Pages;
use super::{Columns, RecordFormat};
use crate::error::DataError;
use crate::guarded::guarded;

/// What a Parquet file begins and ends with.
pub(super) const PARQUET: &[u8] = b"PAR1";
/// What an Arrow file begins with.
pub(super) const ARROW_FILE: &[u8] = b"ARROW1\0\0";
/// What an Arrow stream begins with: the mark in front of every message.
pub(super) const ARROW_STREAM: &[u8] = &[0xff; 4];

/// Rows that are decoded at a time.
const ROWS: usize = 256;

/// A source of batches.
type Batches = Box<dyn Iterator<Item = Result<RecordBatch, ArrowError>>>;

/// A table's rows as objects.
pub(super) struct Table {
    path: PathBuf,
    /// What the file is, for messages.
    kind: &'static str,
    batches: Batches,
    /// What is left of the batch at hand.
    batch: Option<RecordBatch>,
    rows: std::vec::IntoIter<Value>,
    records: usize,
    done: bool,
}

impl Table {
    /// A Parquet file; `read` is told how many of its bytes have been read.
    pub(super) fn parquet(path: &Path, columns: &Columns, read: &Arc<AtomicU64>) -> Result<Self, DataError> {
        let file = File::open(path).map_err(DataError::io(path, "read the data file"))?;
        let open = || -> Result<_, ArrowError> {
            let pages = Pages::open(file, Arc::clone(read))?;
            let metadata = ArrowReaderMetadata::try_new(pages.footer(), ArrowReaderOptions::default())?;
            let (schema, all) = (Arc::clone(metadata.schema()), ProjectionMask::all());
            let levels =
                parquet_to_arrow_field_levels(metadata.parquet_schema(), all, Some(schema.fields()))?;
            let batches = ParquetRecordBatchReader::try_new_with_row_groups(&levels, &pages, ROWS, None)?;
            Ok((schema, batches))
        };
        let (schema, batches) = guarded(open)
            .and_then(|opened| opened.map_err(|error| told(&error)))
            .map_err(|why| broken(path, "Parquet", 0, why))?;
        known(path, &schema, columns)?;
        Ok(Self::new(path, "Parquet", Box::new(batches), None))
    }

    /// An Arrow file or stream.
    pub(super) fn arrow(path: &Path, columns: &Columns, mut bytes: Bytes) -> Result<Self, DataError> {
        let start = bytes.fill_buf().map_err(DataError::io(path, "read the data file"))?;
        let is_file = start.starts_with(ARROW_FILE);
        if is_file {
            bytes.consume(ARROW_FILE.len()); // a stream follows, then a footer that a reader in order has no use for
        }
        let mut stream = Stream { bytes, is_file, decoder: StreamDecoder::new(), buffer: Buffer::default() };
        let first =
            guarded(|| stream.next().transpose()).and_then(|first| first.map_err(|error| told(&error)));
        let first = first.map_err(|why| broken(path, "Arrow", 0, why))?;
        match stream.decoder.schema() {
            Some(schema) => known(path, &schema, columns)?,
            None => return Err(broken(path, "Arrow", 0, "it ends before its schema".to_owned())),
        }
        Ok(Self::new(path, "Arrow", Box::new(stream), first))
    }

    fn new(path: &Path, kind: &'static str, batches: Batches, batch: Option<RecordBatch>) -> Self {
        let path = path.to_path_buf();
        Self { path, kind, batches, batch, rows: Vec::new().into_iter(), records: 0, done: false }
    }

    /// The next rows of the batch at hand, or of the next one that has any; none at the end.
    fn more(&mut self) -> Result<Vec<Value>, ArrowError> {
        loop {
            let batch = match self.batch.take() {
                Some(batch) => batch,
                None => match self.batches.next().transpose()? {
                    Some(batch) => batch,
                    None => return Ok(Vec::new()),
                },
            };
            // An Arrow file may be one batch.
            let (now, later) = (batch.num_rows().min(ROWS), batch.num_rows().saturating_sub(ROWS));
            if later > 0 {
                self.batch = Some(batch.slice(now, later));
            }
            if now > 0 {
                return objects(&batch.slice(0, now));
            }
        }
    }
}

impl Iterator for Table {
    type Item = Result<Raw, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rows.len() == 0 && !self.done {
            match guarded(|| self.more()).and_then(|rows| rows.map_err(|error| told(&error))) {
                Ok(rows) => {
                    self.done = rows.is_empty();
                    self.rows = rows.into_iter();
                }
                Err(why) => {
                    self.done = true;
                    return Some(Err(broken(&self.path, self.kind, self.records, why)));
                }
            }
        }
        let value = self.rows.next()?;
        self.records += 1;
        Some(Ok(Raw { line: None, value: Ok(value) }))
    }
}

/// Rows as JSON objects, as those of other files are. Bytes that are text are text; others are null.
fn objects(batch: &RecordBatch) -> Result<Vec<Value>, ArrowError> {
    let schema = batch.schema();
    let columns = schema.fields().iter().zip(batch.columns()).map(|(field, column)| {
        let is_binary =
            matches!(column.data_type(), DataType::Binary | DataType::LargeBinary | DataType::BinaryView);
        let column = if is_binary { cast(column, &DataType::Utf8)? } else { Arc::clone(column) };
        Ok((field.name().clone(), column, true))
    });
    let batch = RecordBatch::try_from_iter_with_nullable(columns.collect::<Result<Vec<_>, ArrowError>>()?)?;
    let mut lines = Vec::new();
    let mut writer = WriterBuilder::new().with_explicit_nulls(true).build::<_, LineDelimited>(&mut lines);
    writer.write(&batch)?;
    writer.finish()?;
    drop(writer);
    let values = serde_json::Deserializer::from_slice(&lines).into_iter();
    values.collect::<Result<_, _>>().map_err(|error| ArrowError::JsonError(error.to_string()))
}

/// A table whose columns are strangers is told from records that are bad.
fn known(path: &Path, schema: &Schema, columns: &Columns) -> Result<(), DataError> {
    let names: Vec<String> = schema.fields().iter().map(|field| field.name().clone()).collect();
    match RecordFormat::of_columns(&names, columns) {
        Some(_) => Ok(()),
        None => Err(DataError::unknown_columns(path, &names)),
    }
}

fn broken(path: &Path, kind: &'static str, records: usize, message: String) -> DataError {
    DataError::BrokenTable { path: path.to_path_buf(), kind, records, message }
}

/// An error in words; this build reads no compressed Arrow.
fn told(error: &ArrowError) -> String {
    let message = error.to_string();
    if message.contains("feature") && message.contains("compression") {
        format!("{message}; write it without compression, or as Parquet")
    } else {
        message
    }
}

/// The batches of an Arrow stream.
struct Stream {
    bytes: Bytes,
    /// Whether a footer follows.
    is_file: bool,
    decoder: StreamDecoder,
    /// Read, but not decoded.
    buffer: Buffer,
}

impl Iterator for Stream {
    type Item = Result<RecordBatch, ArrowError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if self.buffer.is_empty() {
                let read = match self.bytes.fill_buf() {
                    Ok(read) => read,
                    Err(error) => return Some(Err(error.into())),
                };
                if read.is_empty() {
                    // A file has a footer, which ends the loop below.
                    let cut = || ArrowError::IpcError("it ends before its footer".to_owned());
                    return if self.is_file {
                        Some(Err(cut()))
                    } else {
                        self.decoder.finish().err().map(Err)
                    };
                }
                self.buffer = Buffer::from(read);
                let taken = read.len();
                self.bytes.consume(taken);
            }
            match self.decoder.decode(&mut self.buffer) {
                Ok(None) => {}
                Ok(Some(batch)) => return Some(Ok(batch)),
                // The decoder refuses what stands behind the end of a stream: in a file, its footer.
                Err(_) if self.is_file && self.decoder.finish().is_ok() => return None,
                Err(error) => return Some(Err(error)),
            }
        }
    }
}
