//! Rows on their way to a prepared file: on the disk, so that memory does not bound how many there are.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::error::DataError;
use crate::example::ExampleView;

/// Two files without a name, gone when they are closed: token ids (u32, little-endian) and their marks (u8). In
/// memory are 8 bytes a row.
pub(crate) struct Spool {
    dir: PathBuf,
    token_ids: BufWriter<File>,
    loss_mask: BufWriter<File>,
    /// Where each row ends, in tokens.
    ends: Vec<u64>,
}

/// One of the two things known of a token.
#[derive(Clone, Copy)]
pub(crate) enum Column {
    TokenIds,
    LossMask,
}

impl Spool {
    /// In the folder `dir`.
    pub(crate) fn new(dir: &Path) -> Result<Self, DataError> {
        let file = || tempfile::tempfile_in(dir).map(BufWriter::new).map_err(failed(dir));
        Ok(Self { dir: dir.to_path_buf(), token_ids: file()?, loss_mask: file()?, ends: Vec::new() })
    }

    /// How many rows there are.
    pub(crate) fn rows(&self) -> usize {
        self.ends.len()
    }

    /// Adds a row at the end.
    pub(crate) fn push(&mut self, row: ExampleView<'_>) -> Result<(), DataError> {
        let mut write = || {
            for id in row.token_ids {
                self.token_ids.write_all(&id.to_le_bytes())?;
            }
            row.marks().try_for_each(|mark| self.loss_mask.write_all(&[mark]))
        };
        write().map_err(failed(&self.dir))?;
        self.ends.push(self.ends.last().copied().unwrap_or(0) + row.tokens() as u64);
        Ok(())
    }

    /// Writes what is still in memory: here, where a full disk is told as such, and not while reading.
    pub(crate) fn flush(&mut self) -> Result<(), DataError> {
        let flushed = self.token_ids.flush().and_then(|()| self.loss_mask.flush());
        flushed.map_err(failed(&self.dir))
    }

    /// The folder that the rows lie in.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// How many tokens row `row` has.
    pub(crate) fn tokens(&self, row: usize) -> u64 {
        let start = row.checked_sub(1).and_then(|before| self.ends.get(before)).copied().unwrap_or(0);
        self.ends.get(row).map_or(0, |end| end - start)
    }

    /// Writes one column of the rows that `wanted` names, in order, to `out`. They have been flushed.
    pub(crate) fn copy(
        &self,
        column: Column,
        wanted: &dyn Fn(usize) -> bool,
        out: &mut dyn Write,
    ) -> io::Result<()> {
        let (file, width) = match column {
            Column::TokenIds => (&self.token_ids, 4),
            Column::LossMask => (&self.loss_mask, 1),
        };
        let mut file = file.get_ref();
        file.rewind()?;
        let mut reader = BufReader::with_capacity(1 << 18, &mut file);
        let mut start = 0;
        for (row, &end) in self.ends.iter().enumerate() {
            let bytes = (end - start) * width;
            if wanted(row) {
                io::copy(&mut reader.by_ref().take(bytes), out)?;
            } else {
                reader.seek_relative(bytes as i64)?;
            }
            start = end;
        }
        drop(reader);
        file.seek(SeekFrom::End(0)).map(|_| ())
    }
}

fn failed(dir: &Path) -> impl FnOnce(io::Error) -> DataError {
    DataError::io(dir, "write the prepared rows to a file in this folder")
}
