//! A prepared dataset as a safetensors file.
//!
//! Six tensors, `train.token_ids` (u32), `train.loss_mask` (u8: 0, or 1 for a label of an answer, or 2 for one of a
//! prompt that is learned too), `train.offsets` (u64, rows + 1) and the same for `validation.`; and one metadata entry
//! `pronk.prepared`, a JSON object with everything else and a checksum of all of it. The file is written front to back,
//! a tensor at a time, so that none need be in memory; the checksum, known at the end, is put into the space kept for it.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use atomic_write_file::AtomicWriteFile;
use safetensors::tensor::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::{PreparedDataset, Rows};
use crate::error::DataError;
use crate::example::PROMPT;
use crate::files;
use crate::order::Mixture;
use crate::report::PrepareReport;

/// The metadata entry that marks the file as ours.
const MARK: &str = "pronk.prepared";
/// The layout that this file describes. In format 2 the checksum was that of the tensors alone.
const VERSION: u32 = 3;
/// What stands in the checksum's place while it is made.
const UNSEALED: &str = "0000000000000000000000000000000000000000000000000000000000000000";
/// More header than any report needs.
const MAX_HEADER: u64 = 16 << 20;

/// What a file knows of its rows, beside the rows.
#[derive(Serialize, Deserialize)]
pub(crate) struct About<'a> {
    pub(crate) key: Cow<'a, str>,
    pub(crate) template: Cow<'a, str>,
    pub(crate) max_seq_len: usize,
    pub(crate) mixture: Cow<'a, Mixture>,
    pub(crate) report: Cow<'a, PrepareReport>,
}

/// The JSON object in the metadata.
#[derive(Serialize, Deserialize)]
struct Header<'a> {
    version: u32,
    /// SHA-256 of this object with [`UNSEALED`] here, and of all tensors' bytes, in the order of [`names`].
    checksum: String,
    #[serde(flatten)]
    about: About<'a>,
}

/// As much as tells what kind of file it is, whatever else is in it.
#[derive(Deserialize)]
struct Probe {
    version: u32,
}

#[derive(Deserialize)]
struct SafetensorsHeader {
    #[serde(rename = "__metadata__", default)]
    metadata: HashMap<String, String>,
}

/// Writes all bytes of a tensor.
type Writing<'a> = Box<dyn FnMut(&mut dyn Write) -> io::Result<()> + 'a>;

/// A tensor to write: how many bytes, and how they are written.
pub(crate) struct Tensor<'a> {
    pub(crate) bytes: u64,
    pub(crate) write: Writing<'a>,
}

impl<'a> Tensor<'a> {
    /// Bytes that are in memory.
    pub(crate) fn of(bytes: Cow<'a, [u8]>) -> Self {
        Self { bytes: bytes.len() as u64, write: Box::new(move |out| out.write_all(&bytes)) }
    }
}

/// Name, type and width of each tensor, in the order of the file: the wide ones first, so that all are aligned.
fn names() -> impl Iterator<Item = (String, Dtype, u64)> {
    let kinds = [("offsets", Dtype::U64, 8), ("token_ids", Dtype::U32, 4), ("loss_mask", Dtype::U8, 1)];
    kinds.into_iter().flat_map(|(kind, dtype, width)| {
        ["train", "validation"].map(|part| (format!("{part}.{kind}"), dtype, width))
    })
}

/// Writes the file: to a temporary name beside `path`, synced, then renamed. `tensors` are the offsets, token ids
/// and label marks of the rows to train on and of those held out, by turns: as [`names`].
pub(crate) fn write(path: &Path, about: About<'_>, tensors: [Tensor<'_>; 6]) -> Result<(), DataError> {
    let header = Header { version: VERSION, checksum: UNSEALED.to_owned(), about };
    let write = || -> io::Result<()> {
        let ours = serde_json::to_string(&header)?;
        let header = safetensors_header(&ours, &tensors)?;
        let place = header.windows(UNSEALED.len()).position(|window| window == UNSEALED.as_bytes());
        let mut file = AtomicWriteFile::open(path)?;
        file.write_all(&header)?;
        let mut hasher = Sha256::new();
        files::hash_field(&mut hasher, ours.as_bytes());
        for mut tensor in tensors {
            hasher.update(tensor.bytes.to_le_bytes());
            let mut out =
                Hashed { file: io::BufWriter::with_capacity(1 << 18, &mut file), hasher: &mut hasher };
            (tensor.write)(&mut out)?;
            out.flush()?;
        }
        file.seek(SeekFrom::Start(place.ok_or(io::ErrorKind::InvalidData)? as u64))?;
        file.write_all(files::hex(hasher).as_bytes())?;
        // `commit` syncs before it renames; without it the temporary file is removed on drop.
        file.commit()
    };
    write().map_err(DataError::io(path, "write the prepared file"))
}

/// The front of a safetensors file: its length, then JSON, padded so that what follows is aligned.
fn safetensors_header(ours: &str, tensors: &[Tensor<'_>]) -> io::Result<Vec<u8>> {
    let mut entries = Map::new();
    entries.insert("__metadata__".to_owned(), json!({ MARK: ours }));
    let mut start = 0;
    for ((name, dtype, width), tensor) in names().zip(tensors) {
        let end = start + tensor.bytes;
        let dtype = serde_json::to_value(dtype)?;
        entries.insert(
            name,
            json!({"dtype": dtype, "shape": [tensor.bytes / width], "data_offsets": [start, end]}),
        );
        start = end;
    }
    let mut text = serde_json::to_vec(&Value::Object(entries))?;
    text.resize(text.len().next_multiple_of(8), b' ');
    Ok([&(text.len() as u64).to_le_bytes()[..], &text].concat())
}

/// Hashes what is written.
struct Hashed<'a, W: Write> {
    file: W,
    hasher: &'a mut Sha256,
}

impl<W: Write> Write for Hashed<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hasher.update(bytes.get(..written).unwrap_or_default());
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl PreparedDataset {
    /// Writes the file: to a temporary name beside `path`, synced, then renamed.
    pub fn write(&self, path: &Path) -> Result<(), DataError> {
        let about = About {
            key: Cow::Borrowed(&self.key),
            template: Cow::Borrowed(&self.template),
            max_seq_len: self.max_seq_len,
            mixture: Cow::Borrowed(&self.mixture),
            report: Cow::Borrowed(&self.report),
        };
        let parts = [&self.train, &self.validation];
        let [a, b] = parts.map(|rows| offsets(rows.offsets.iter().map(|&offset| offset as u64)));
        let [c, d] = parts.map(|rows| rows.token_ids.iter().flat_map(|id| id.to_le_bytes()).collect());
        let [e, f] = parts.map(|rows| rows.marks().collect());
        write(path, about, [a, b, Tensor::of(c), Tensor::of(d), Tensor::of(e), Tensor::of(f)])
    }

    /// Reads a file that [`PreparedDataset::write`] wrote. Nothing in it is taken on trust: a foreign, truncated
    /// or damaged file is an error that says so.
    pub fn read(path: &Path) -> Result<Self, DataError> {
        let wrong = |message: String| DataError::Prepared { path: path.to_path_buf(), message };
        let (ours, bytes) = read_ours(path)?;
        let Probe { version } =
            serde_json::from_str(&ours).map_err(|e| wrong(format!("damaged header: {e}")))?;
        if version != VERSION {
            return Err(wrong(format!("written in format {version}, this pronk reads format {VERSION}")));
        }
        let header: Header<'_> =
            serde_json::from_str(&ours).map_err(|e| wrong(format!("damaged header: {e}")))?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(|e| {
            wrong(format!("truncated or damaged: its header does not fit its {} bytes ({e})", bytes.len()))
        })?;
        let found = decode_all(&tensors, &ours, &header).map_err(wrong)?;
        Ok(found)
    }
}

/// The metadata entry and all bytes of a prepared file. The front is looked at first, so that a mistaken path to
/// a model of 14 GB is told apart without reading it.
fn read_ours(path: &Path) -> Result<(String, Vec<u8>), DataError> {
    let io = |e| DataError::io(path, "read the prepared file")(e);
    let wrong = |message: &str| DataError::Prepared { path: path.to_path_buf(), message: message.to_owned() };
    let mut file = File::open(path).map_err(io)?;
    let mut bytes = Vec::new();
    Read::by_ref(&mut file).take(8).read_to_end(&mut bytes).map_err(io)?;
    let Ok(size) = <[u8; 8]>::try_from(bytes.as_slice()).map(u64::from_le_bytes) else {
        return Err(wrong("not a prepared dataset: shorter than 8 bytes"));
    };
    if size > MAX_HEADER {
        return Err(wrong("not a prepared dataset: it does not begin with the length of a header"));
    }
    // `take` bounds the read by what the file really holds, whatever the header claims.
    Read::by_ref(&mut file).take(size).read_to_end(&mut bytes).map_err(io)?;
    let json = bytes.get(8..).unwrap_or_default();
    if json.len() as u64 != size {
        return Err(wrong(&format!(
            "truncated: the header claims {size} bytes, the file ends after {}",
            json.len()
        )));
    }
    let header: SafetensorsHeader = serde_json::from_slice(json)
        .map_err(|e| wrong(&format!("not a prepared dataset: expected a safetensors header ({e})")))?;
    let Some(ours) = header.metadata.get(MARK).cloned() else {
        return Err(wrong("not a prepared dataset: a safetensors file, but not one that `pronk prep` wrote"));
    };
    file.read_to_end(&mut bytes).map_err(io)?;
    Ok((ours, bytes))
}

/// `header` is what stands in `ours`.
fn decode_all(tensors: &SafeTensors<'_>, ours: &str, header: &Header<'_>) -> Result<PreparedDataset, String> {
    let train = Encoded::find(tensors, "train")?;
    let validation = Encoded::find(tensors, "validation")?;
    let mut hasher = Sha256::new();
    files::hash_field(&mut hasher, ours.replacen(&header.checksum, UNSEALED, 1).as_bytes());
    for bytes in [
        train.offsets,
        validation.offsets,
        train.token_ids,
        validation.token_ids,
        train.loss_mask,
        validation.loss_mask,
    ] {
        files::hash_field(&mut hasher, bytes);
    }
    let found = files::hex(hasher);
    if found != header.checksum {
        return Err(format!("damaged: checksum {found}, expected {}", header.checksum));
    }
    let About { key, template, max_seq_len, mixture, report } = &header.about;
    let train = train.decode("train", *max_seq_len)?;
    if mixture.rows() != train.len() {
        let (rows, parts) = (train.len(), mixture.rows());
        return Err(format!("damaged: {rows} rows to train on, but weights for {parts}"));
    }
    Ok(PreparedDataset {
        key: key.to_string(),
        train,
        validation: validation.decode("validation", *max_seq_len)?,
        mixture: mixture.clone().into_owned(),
        report: report.clone().into_owned(),
        template: template.to_string(),
        max_seq_len: *max_seq_len,
    })
}

/// Where each row begins, and where the last one ends.
pub(crate) fn offsets<'a>(offsets: impl Iterator<Item = u64>) -> Tensor<'a> {
    Tensor::of(offsets.flat_map(u64::to_le_bytes).collect())
}

/// [`Rows`] as the little-endian bytes of three tensors.
struct Encoded<'a> {
    token_ids: &'a [u8],
    loss_mask: &'a [u8],
    offsets: &'a [u8],
}

impl<'a> Encoded<'a> {
    fn find(tensors: &SafeTensors<'a>, part: &str) -> Result<Self, String> {
        let find = |name: &str, dtype: Dtype| {
            let name = format!("{part}.{name}");
            let tensor = tensors.tensor(&name).map_err(|_| format!("damaged: no tensor {name}"))?;
            if tensor.dtype() != dtype || tensor.shape().len() != 1 {
                let (found, shape) = (tensor.dtype(), tensor.shape());
                return Err(format!(
                    "damaged: {name} is {found:?} of shape {shape:?}, expected a vector of {dtype:?}"
                ));
            }
            Ok(tensor.data())
        };
        Ok(Self {
            token_ids: find("token_ids", Dtype::U32)?,
            loss_mask: find("loss_mask", Dtype::U8)?,
            offsets: find("offsets", Dtype::U64)?,
        })
    }

    /// The rows, if they are rows: every offset in range and above the one before, every mark 0, 1 or 2, no label
    /// on a first token, none longer than `max_seq_len`.
    fn decode(&self, part: &str, max_seq_len: usize) -> Result<Rows, String> {
        let token_ids: Vec<u32> =
            self.token_ids.as_chunks().0.iter().map(|&b| u32::from_le_bytes(b)).collect();
        if self.loss_mask.len() != token_ids.len() {
            let (marks, tokens) = (self.loss_mask.len(), token_ids.len());
            return Err(format!("damaged: {part} has {marks} label marks for {tokens} tokens"));
        }
        if let Some(at) = self.loss_mask.iter().position(|&mark| mark > PROMPT) {
            return Err(format!("damaged: {part}.loss_mask[{at}] is neither 0, 1 nor 2"));
        }
        let offsets = self.decode_offsets(part, token_ids.len(), max_seq_len)?;
        let labelled = |&start: &usize| self.loss_mask.get(start).is_some_and(|&mark| mark != 0);
        if let Some(row) = offsets.iter().position(labelled) {
            return Err(format!("damaged: {part} row {row} has a label on its first token"));
        }
        Ok(Rows::from_columns(token_ids, self.loss_mask, offsets))
    }

    fn decode_offsets(&self, part: &str, tokens: usize, max_seq_len: usize) -> Result<Vec<usize>, String> {
        let raw = self.offsets.as_chunks().0.iter().map(|&b| u64::from_le_bytes(b));
        let offsets: Vec<usize> = raw.map(|offset| usize::try_from(offset).unwrap_or(usize::MAX)).collect();
        if offsets.first() != Some(&0) || offsets.last() != Some(&tokens) {
            let (first, last) = (offsets.first(), offsets.last());
            return Err(format!(
                "damaged: {part}.offsets go from {first:?} to {last:?}, expected 0 to {tokens}"
            ));
        }
        for (row, pair) in offsets.windows(2).enumerate() {
            let [start, end] = pair else { continue };
            if end <= start || end - start > max_seq_len {
                return Err(format!(
                    "damaged: {part} row {row} goes from {start} to {end}, expected 1 to {max_seq_len} tokens"
                ));
            }
        }
        Ok(offsets)
    }
}
