//! Instruction records, read from a JSON array or from JSON Lines.

mod parse;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::DataError;
use crate::files;

/// How many bad records an error message lists before it only counts.
const LISTED: usize = 20;

/// One instruction with its answer, as in the Alpaca data.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct InstructRecord {
    /// What is asked.
    pub instruction: String,
    /// What it is asked about; empty where the record has none.
    pub input: String,
    /// The answer to learn.
    pub output: String,
}

/// Where a record came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The file.
    pub file: Arc<Path>,
    /// 1-based number of the record in its file.
    pub record: usize,
    /// 1-based line, known for JSON Lines.
    pub line: Option<usize>,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: record {}", self.file.display(), self.record)?;
        match self.line {
            Some(line) => write!(f, " (line {line})"),
            None => Ok(()),
        }
    }
}

/// A record that cannot be used, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordProblem {
    /// Which record.
    pub origin: Origin,
    /// What was expected and what was found.
    pub message: String,
}

impl fmt::Display for RecordProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.origin, self.message)
    }
}

/// All the records that cannot be used; shows the first 20 and counts the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadRecords {
    /// The problems, in file order.
    pub problems: Vec<RecordProblem>,
    /// How many records there were in all, good ones included.
    pub records: usize,
}

impl fmt::Display for BadRecords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} of {} records cannot be used:", self.problems.len(), self.records)?;
        for problem in self.problems.iter().take(LISTED) {
            writeln!(f, "  {problem}")?;
        }
        if let Some(more @ 1..) = self.problems.len().checked_sub(LISTED) {
            writeln!(f, "  ... and {more} more")?;
        }
        write!(f, "Correct them, or leave them out with --skip-bad")
    }
}

/// What was found in the data files.
#[derive(Debug, Clone, Default)]
pub struct Records {
    /// The good records, in file order.
    pub records: Vec<InstructRecord>,
    /// For each of `records`, where it came from.
    pub origins: Vec<Origin>,
    /// The bad records, in file order.
    pub problems: Vec<RecordProblem>,
    /// Fields other than instruction, input and output, with the number of good records that have them.
    pub ignored_fields: BTreeMap<String, usize>,
}

impl Records {
    /// Fails if any record is bad, unless `skip_bad`.
    pub fn check(&self, skip_bad: bool) -> Result<(), DataError> {
        if skip_bad || self.problems.is_empty() {
            return Ok(());
        }
        let records = self.records.len() + self.problems.len();
        Err(DataError::BadRecords(BadRecords { problems: self.problems.clone(), records }))
    }
}

/// Reads all records of all files, in order. Bad records are collected, not fatal; a file that is unreadable,
/// empty, not UTF-8 or broken as a whole is an error, and all such files are named.
pub fn read_records(files: &[PathBuf]) -> Result<Records, DataError> {
    let mut found = Records::default();
    let mut failures = Vec::new();
    for path in files {
        let read = load(path).and_then(|bytes| read_bytes(path, &bytes, &mut found));
        failures.extend(read.err());
    }
    finish(found, failures)
}

/// The bytes of a data file.
pub(crate) fn load(path: &Path) -> Result<Vec<u8>, DataError> {
    files::read(path, "read the data file")
}

/// Like [`read_records`], from files that are in memory already.
pub(crate) fn read_loaded(files: &[(PathBuf, Vec<u8>)]) -> Result<Records, DataError> {
    let mut found = Records::default();
    let failures =
        files.iter().filter_map(|(path, bytes)| read_bytes(path, bytes, &mut found).err()).collect();
    finish(found, failures)
}

fn finish(found: Records, mut failures: Vec<DataError>) -> Result<Records, DataError> {
    match failures.len() {
        0 => Ok(found),
        1 => Err(failures.swap_remove(0)),
        _ => Err(DataError::Several(failures)),
    }
}

/// Reads one file's records into `found`; tells an array from JSON Lines by the first character.
fn read_bytes(path: &Path, bytes: &[u8], found: &mut Records) -> Result<(), DataError> {
    let text = files::text(path, bytes)?;
    let before = found.records.len() + found.problems.len();
    match text.trim_start().chars().next() {
        None => return Err(DataError::EmptyFile { path: path.to_path_buf() }),
        Some('[') => parse::array(path, text, found)?,
        Some(_) => parse::lines(path, text, found)?,
    }
    if found.records.len() + found.problems.len() == before {
        return Err(DataError::NoRecords { path: path.to_path_buf() });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
