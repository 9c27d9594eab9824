//! The pages of a Parquet file. Its reader makes room for what a page says of itself, which is looked at before.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use ::parquet::arrow::arrow_reader::RowGroups;
use ::parquet::column::page::{Page, PageIterator, PageMetadata, PageReader};
use ::parquet::errors::ParquetError;
use ::parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader, RowGroupMetaData};
use ::parquet::file::reader::{ChunkReader, Length, SerializedPageReader};
use bytes::Bytes;

use super::container::Counted;

type Result<T> = std::result::Result<T, ParquetError>;

/// The bytes that a page may unpack to; writers close a page at about one MiB, but look only after some rows.
const MOST_BYTES: i64 = 1 << 27;

/// All pages of a file.
pub(super) struct Pages {
    file: Arc<Whole>,
    metadata: Arc<ParquetMetaData>,
}

impl Pages {
    /// Of `file`; `read` is told how many of its bytes have been read.
    pub(super) fn open(file: File, read: Arc<AtomicU64>) -> Result<Self> {
        let file = Whole { file, read };
        let metadata = ParquetMetaDataReader::new().parse_and_finish(&file)?;
        Ok(Self { file: Arc::new(file), metadata: Arc::new(metadata) })
    }

    pub(super) fn footer(&self) -> Arc<ParquetMetaData> {
        Arc::clone(&self.metadata)
    }
}

impl RowGroups for Pages {
    fn num_rows(&self) -> usize {
        usize::try_from(self.metadata.file_metadata().num_rows()).unwrap_or_default()
    }

    fn column_chunks(&self, column: usize) -> Result<Box<dyn PageIterator>> {
        let (file, metadata) = (Arc::clone(&self.file), Arc::clone(&self.metadata));
        Ok(Box::new(Column { file, metadata, number: column, row_group: 0 }))
    }

    fn row_groups(&self) -> Box<dyn Iterator<Item = &RowGroupMetaData> + '_> {
        Box::new(self.metadata.row_groups().iter())
    }

    fn metadata(&self) -> &ParquetMetaData {
        &self.metadata
    }
}

/// The pages of a column, a row group at a time.
struct Column {
    file: Arc<Whole>,
    metadata: Arc<ParquetMetaData>,
    /// Which one.
    number: usize,
    /// The next one.
    row_group: usize,
}

impl Iterator for Column {
    type Item = Result<Box<dyn PageReader>>;

    fn next(&mut self) -> Option<Self::Item> {
        let rows = self.metadata.row_groups().get(self.row_group)?;
        self.row_group += 1;
        let open = || -> Result<Box<dyn PageReader>> {
            let Some(column) = rows.columns().get(self.number) else {
                return Err(ParquetError::General("a row group lacks a column".to_owned()));
            };
            let file = Arc::new(Headed { file: Arc::clone(&self.file), is_peeked: AtomicBool::new(false) });
            let rows = usize::try_from(rows.num_rows())?;
            let pages = SerializedPageReader::new(Arc::clone(&file), column, rows, None)?;
            Ok(Box::new(Sound { pages, file }))
        };
        Some(open())
    }
}

impl PageIterator for Column {}

/// Pages whose dictionaries have as many bytes as values: as many values as they say have room made for them.
struct Sound {
    pages: SerializedPageReader<Headed>,
    /// The same that the pages are read from.
    file: Arc<Headed>,
}

impl Iterator for Sound {
    type Item = Result<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

impl PageReader for Sound {
    fn get_next_page(&mut self) -> Result<Option<Page>> {
        let page = self.pages.get_next_page()?;
        match &page {
            Some(Page::DictionaryPage { buf, num_values, .. }) if *num_values as usize > buf.len() => {
                let told = format!("a dictionary is to hold {num_values} values in {} bytes", buf.len());
                Err(ParquetError::General(told))
            }
            _ => Ok(page),
        }
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>> {
        let page = self.pages.peek_next_page()?;
        self.file.is_peeked.store(page.is_some(), Ordering::Relaxed);
        Ok(page)
    }

    fn skip_next_page(&mut self) -> Result<()> {
        self.file.is_peeked.store(false, Ordering::Relaxed);
        self.pages.skip_next_page()
    }
}

/// A file that is read from only where a page's header is, and then as many bytes as are the page's.
struct Headed {
    file: Arc<Whole>,
    /// Whether the header of the next page has been read: then its reader asks to read behind it, and does not.
    is_peeked: AtomicBool,
}

impl Length for Headed {
    fn len(&self) -> u64 {
        self.file.len()
    }
}

impl ChunkReader for Headed {
    type T = BufReader<Counted>;

    fn get_read(&self, start: u64) -> Result<Self::T> {
        if self.is_peeked.swap(false, Ordering::Relaxed) {
            return self.file.get_read(start);
        }
        let bytes = unpacked_bytes(&mut self.file.get_read(start)?).map_err(|error| {
            ParquetError::General(format!("the header of a page at byte {start}: {error}"))
        })?;
        if (0..=MOST_BYTES).contains(&bytes) {
            return self.file.get_read(start);
        }
        Err(ParquetError::General(format!(
            "a page at byte {start} is to unpack to {bytes} bytes, {MOST_BYTES} at most are read (pages can be written smaller)"
        )))
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes> {
        self.file.get_bytes(start, length)
    }
}

/// A file whose parts may be asked for in any order. A part that it does not have is refused before there is memory
/// for it.
struct Whole {
    file: File,
    read: Arc<AtomicU64>,
}

impl Whole {
    fn from(&self, start: u64) -> io::Result<Counted> {
        let mut file = self.file.try_clone()?;
        file.seek(SeekFrom::Start(start))?;
        Ok(Counted { file, read: Arc::clone(&self.read) })
    }
}

impl Length for Whole {
    fn len(&self) -> u64 {
        self.file.metadata().map_or(0, |data| data.len())
    }
}

impl ChunkReader for Whole {
    type T = BufReader<Counted>;

    fn get_read(&self, start: u64) -> Result<Self::T> {
        Ok(BufReader::new(self.from(start)?))
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes> {
        let mut piece = Vec::new();
        self.from(start)?.take(length as u64).read_to_end(&mut piece)?;
        if piece.len() == length {
            return Ok(piece.into());
        }
        Err(ParquetError::EOF(format!("{length} bytes expected from byte {start}, {} found", piece.len())))
    }
}

/// What a field of a header is. parquet's reader takes a known field for what it should be without a look at what the file
/// says that it is: where both differ, it would read on from another place than we do.
#[derive(Clone, Copy)]
enum Field {
    Bool,
    I32,
    Struct(&'static [Field]),
}

/// A page's header: its type, its bytes unpacked and packed, a checksum, and one of four structures (`PageHeader` of
/// <https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift>). Statistics, the last field of two
/// of these, are passed over as the file says that they are, by us and by parquet.
const PAGE: &[Field] = {
    use Field::{Bool, I32, Struct};
    const STATISTICS: Field = Struct(&[]);
    const DATA: Field = Struct(&[I32, I32, I32, I32, STATISTICS]);
    const INDEX: Field = Struct(&[]);
    const DICTIONARY: Field = Struct(&[I32, I32, Bool]);
    const DATA_V2: Field = Struct(&[I32, I32, I32, I32, I32, I32, Bool, STATISTICS]);
    &[I32, I32, I32, I32, DATA, INDEX, DICTIONARY, DATA_V2]
};

/// How many structures may lie in each other.
const DEPTH: usize = 4;

/// The bytes that a page says it unpacks to.
fn unpacked_bytes(header: &mut impl BufRead) -> io::Result<i64> {
    let mut bytes = None;
    structure(header, PAGE, DEPTH, &mut |id, value| {
        if id == 2 {
            bytes = Some(value);
        }
    })?;
    bytes.ok_or_else(|| damaged("it has no size"))
}

/// Reads a structure in Thrift's compact protocol
/// (<https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md>) and tells its whole numbers, in
/// ascending order of their fields. `known` are its fields from 1 on; others are passed over.
fn structure(
    bytes: &mut impl BufRead,
    known: &[Field],
    depth: usize,
    found: &mut dyn FnMut(usize, i64),
) -> io::Result<()> {
    let depth = depth.checked_sub(1).ok_or_else(|| damaged("it lies too deep"))?;
    let mut id = 0;
    loop {
        let head = byte(bytes)?;
        // How far it is from the last field's number; a number of its own, behind a zero, is for those beyond 15.
        let (step, kind) = (usize::from(head >> 4), head & 15);
        match (step, kind) {
            (0, 0) => return Ok(()),
            (0, _) | (_, 0) => return Err(damaged("its fields are out of order")),
            _ => id += step,
        }
        let known = known.get(id - 1).copied();
        match (known, kind) {
            (None | Some(Field::Bool), 1 | 2) => {}
            (Some(Field::I32), 5) => {
                let value =
                    i32::try_from(whole_number(bytes)?).map_err(|_| damaged("a number is too large"))?;
                found(id, value.into());
            }
            (None, 4..=6) => drop(whole_number(bytes)?),
            (None, 3) => drop(byte(bytes)?),
            (None, 7) => pass(bytes, 8)?,
            (None, 8) => {
                let length = variable(bytes)?;
                pass(bytes, length)?;
            }
            (Some(Field::Struct(fields)), 12) => structure(bytes, fields, depth, &mut |_, _| {})?,
            (None, 12) => structure(bytes, &[], depth, &mut |_, _| {})?,
            _ => return Err(damaged("a field is not what it should be")),
        }
    }
}

fn damaged(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

fn byte(bytes: &mut impl Read) -> io::Result<u8> {
    let mut byte = [0];
    bytes.read_exact(&mut byte)?;
    Ok(byte[0])
}

fn pass(bytes: &mut impl Read, length: u64) -> io::Result<()> {
    let passed = io::copy(&mut bytes.take(length), &mut io::sink())?;
    if passed == length { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Seven bits a byte, the lowest first, as long as the eighth is set.
fn variable(bytes: &mut impl Read) -> io::Result<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = byte(bytes)?;
        value |= u64::from(byte & 127) << shift;
        if byte < 128 {
            return Ok(value);
        }
    }
    Err(damaged("a number is too long"))
}

/// Whose sign is in its lowest bit.
fn whole_number(bytes: &mut impl Read) -> io::Result<i64> {
    let value = variable(bytes)?;
    Ok((value >> 1).cast_signed() ^ -(value & 1).cast_signed())
}
