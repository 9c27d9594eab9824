//! JSON arrays and JSON Lines, one record in memory at a time.

use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::IgnoredAny;

use super::container::{self, Bytes, MOST_BYTES, Opened, Raw};
use crate::error::DataError;

/// One record a line; blank lines are passed over.
pub(super) struct Lines {
    path: PathBuf,
    bytes: Bytes,
    buffer: Vec<u8>,
    /// Lines and bytes behind us.
    line: usize,
    offset: usize,
    records: usize,
    done: bool,
}

impl Lines {
    pub(super) fn new(path: &Path, bytes: Bytes) -> Self {
        let path = path.to_path_buf();
        Self { path, bytes, buffer: Vec::new(), line: 0, offset: 0, records: 0, done: false }
    }

    /// The next line that is not blank, in `buffer`; whether there is one.
    fn advance(&mut self) -> Result<bool, DataError> {
        loop {
            self.offset += self.buffer.len();
            self.buffer.clear();
            let mut bytes = self.bytes.by_ref().take(MOST_BYTES as u64 + 1);
            let read = bytes.read_until(b'\n', &mut self.buffer);
            if read.map_err(DataError::io(&self.path, "read the data file"))? == 0 {
                return Ok(false);
            }
            self.line += 1;
            if self.buffer.len() > MOST_BYTES {
                return Err(container::too_long(&self.path, self.records + 1, Some(self.line)));
            }
            let blank = without_bom(&self.buffer, self.line == 1).iter().all(u8::is_ascii_whitespace);
            if !blank {
                return Ok(true);
            }
        }
    }

    fn record(&mut self) -> Result<Raw, DataError> {
        self.records += 1;
        let bytes = without_bom(&self.buffer, self.line == 1);
        let skipped = self.buffer.len() - bytes.len();
        let text = std::str::from_utf8(bytes).map_err(|error| DataError::NotUtf8 {
            path: self.path.clone(),
            offset: self.offset + skipped + error.valid_up_to(),
            line: self.line,
        })?;
        let value = serde_json::from_str(text.trim_end())
            .map_err(|error| format!("broken JSON at column {}: {}", error.column(), without_place(&error)));
        // An object spread over lines would give one complaint a line; say the one thing that helps.
        if value.is_err() && self.records == 1 && is_one_value(&self.path) {
            return Err(DataError::NotAList { path: self.path.clone() });
        }
        Ok(Raw { line: Some(self.line), value })
    }
}

impl Iterator for Lines {
    type Item = Result<Raw, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let raw = match self.advance() {
            Ok(true) => self.record(),
            Ok(false) => return None,
            Err(error) => Err(error),
        };
        self.done = raw.is_err();
        Some(raw)
    }
}

/// Whether the whole file is one JSON value.
fn is_one_value(path: &Path) -> bool {
    container::bytes(path, &Arc::default()).is_ok_and(|Opened { mut bytes, .. }| {
        if bytes.fill_buf().is_ok_and(|start| start.starts_with(b"\xef\xbb\xbf")) {
            bytes.consume(3);
        }
        serde_json::from_reader::<_, IgnoredAny>(bytes).is_ok()
    })
}

fn without_bom(bytes: &[u8], first: bool) -> &[u8] {
    if first { bytes.strip_prefix(b"\xef\xbb\xbf".as_slice()).unwrap_or(bytes) } else { bytes }
}

/// `serde_json`'s message without its " at line 1 column 2", which the caller says in its own way.
fn without_place(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    message.strip_suffix(&place).unwrap_or(&message).to_owned()
}

/// Where a byte stands in its file.
#[derive(Clone, Copy)]
struct Place {
    offset: usize,
    line: usize,
    column: usize,
}

/// `[{..}, {..}]`, cut into its elements without looking into them; each is parsed alone.
pub(super) struct Array {
    path: PathBuf,
    bytes: Bytes,
    /// Of the next byte.
    place: Place,
    records: usize,
    done: bool,
}

impl Array {
    /// `bytes` begin with white space or `[`.
    pub(super) fn new(path: &Path, mut bytes: Bytes) -> Result<Self, DataError> {
        let start = bytes.fill_buf().map_err(DataError::io(path, "read the data file"))?;
        let bom = if start.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
        bytes.consume(bom);
        let place = Place { offset: bom, line: 1, column: 1 };
        let mut array = Self { path: path.to_path_buf(), bytes, place, records: 0, done: false };
        array.skip_white_space()?;
        array.next_byte()?; // the bracket
        Ok(array)
    }

    fn peek(&mut self) -> Result<Option<u8>, DataError> {
        let buffer = self.bytes.fill_buf().map_err(DataError::io(&self.path, "read the data file"))?;
        Ok(buffer.first().copied())
    }

    fn next_byte(&mut self) -> Result<Option<u8>, DataError> {
        let byte = self.peek()?;
        if let Some(byte) = byte {
            self.bytes.consume(1);
            self.pass(byte);
        }
        Ok(byte)
    }

    fn pass(&mut self, byte: u8) {
        self.place.offset += 1;
        if byte == b'\n' {
            self.place.line += 1;
            self.place.column = 1;
        } else {
            self.place.column += 1;
        }
    }

    fn skip_white_space(&mut self) -> Result<(), DataError> {
        while self.peek()?.is_some_and(|byte| byte.is_ascii_whitespace()) {
            self.next_byte()?;
        }
        Ok(())
    }

    fn broken(&self, place: Place, message: &str) -> DataError {
        DataError::BrokenJson {
            path: self.path.clone(),
            line: place.line,
            column: place.column,
            records: self.records,
            message: message.to_owned(),
        }
    }

    /// The next element; `None` behind the last, when nothing but white space may follow.
    fn element(&mut self) -> Result<Option<Raw>, DataError> {
        self.skip_white_space()?;
        match self.peek()? {
            Some(b']') => return self.end().map(|()| None),
            Some(b',') if self.records > 0 => {
                self.next_byte()?;
                self.skip_white_space()?;
                if self.peek()? == Some(b']') {
                    return Err(self.broken(self.place, "trailing comma"));
                }
            }
            Some(_) if self.records > 0 => return Err(self.broken(self.place, "expected `,` or `]`")),
            _ => {}
        }
        let start = self.place;
        let bytes = self.cut()?;
        let text = std::str::from_utf8(&bytes).map_err(|error| {
            let before = bytes.get(..error.valid_up_to()).unwrap_or_default();
            let lines = lines_in(before);
            DataError::NotUtf8 {
                path: self.path.clone(),
                offset: start.offset + error.valid_up_to(),
                line: start.line + lines,
            }
        })?;
        let value = serde_json::from_str(text).map_err(|error| {
            let column = if error.line() <= 1 { start.column + error.column() - 1 } else { error.column() };
            let place = Place { line: start.line + error.line().max(1) - 1, column, ..start };
            self.broken(place, &without_place(&error))
        })?;
        self.records += 1;
        Ok(Some(Raw { line: None, value: Ok(value) }))
    }

    /// The bytes up to the `,` or `]` behind the element, or to the end of the file.
    fn cut(&mut self) -> Result<Vec<u8>, DataError> {
        let mut element = Vec::new();
        let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
        loop {
            let buffer = self.bytes.fill_buf().map_err(DataError::io(&self.path, "read the data file"))?;
            let mut taken = 0;
            let mut ended = buffer.is_empty();
            for &byte in buffer {
                match byte {
                    _ if escaped => escaped = false,
                    b'\\' if in_string => escaped = true,
                    b'"' => in_string = !in_string,
                    _ if in_string => {}
                    b'{' | b'[' => depth += 1,
                    b',' | b']' | b'}' if depth == 0 => ended = true,
                    b'}' | b']' => depth -= 1,
                    _ => {}
                }
                if ended {
                    break;
                }
                taken += 1;
            }
            let passed = buffer.get(..taken).unwrap_or_default();
            if element.len() + passed.len() > MOST_BYTES {
                return Err(container::too_long(&self.path, self.records + 1, None));
            }
            element.extend_from_slice(passed);
            self.place.offset += taken;
            match passed.iter().rposition(|&byte| byte == b'\n') {
                Some(last) => {
                    self.place.line += lines_in(passed);
                    self.place.column = taken - last;
                }
                None => self.place.column += taken,
            }
            self.bytes.consume(taken);
            if ended {
                return Ok(element);
            }
        }
    }

    fn end(&mut self) -> Result<(), DataError> {
        self.next_byte()?;
        self.skip_white_space()?;
        match self.peek()? {
            Some(_) => Err(self.broken(self.place, "trailing characters")),
            None => Ok(()),
        }
    }
}

impl Iterator for Array {
    type Item = Result<Raw, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let found = self.element().transpose();
        self.done = !matches!(found, Some(Ok(_)));
        found
    }
}

/// How many lines end in `bytes`.
#[allow(clippy::naive_bytecount)] // of a record at most, and of a file only where it is broken
fn lines_in(bytes: &[u8]) -> usize {
    bytes.iter().filter(|&&byte| byte == b'\n').count()
}
