//! A prepared dataset as a safetensors file.
//!
//! Six tensors, `train.token_ids` (u32), `train.loss_mask` (u8, 0 or 1), `train.offsets` (u64, rows + 1) and the
//! same for `validation.`; and one metadata entry `pronk.prepared`, a JSON object with everything else and a
//! checksum. One entry and not several, because safetensors writes them in no fixed order, and the same data
//! should give the same file.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{PreparedDataset, Rows};
use crate::error::DataError;
use crate::files;
use crate::report::PrepareReport;

/// The metadata entry that marks the file as ours.
const MARK: &str = "pronk.prepared";
/// The layout that this file describes.
const VERSION: u32 = 1;
/// More header than any report needs.
const MAX_HEADER: u64 = 16 << 20;

/// The JSON object in the metadata.
#[derive(Serialize, Deserialize)]
struct Header<'a> {
    version: u32,
    key: Cow<'a, str>,
    template: Cow<'a, str>,
    max_seq_len: usize,
    /// SHA-256 of all tensors' bytes, in the order of [`Encoded::tensors`].
    checksum: String,
    report: Cow<'a, PrepareReport>,
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

impl PreparedDataset {
    /// Writes the file: to a temporary name beside `path`, synced, then renamed.
    pub fn write(&self, path: &Path) -> Result<(), DataError> {
        let rows = [("train", Encoded::new(&self.train)), ("validation", Encoded::new(&self.validation))];
        let tensors = || rows.iter().flat_map(|(name, encoded)| encoded.tensors(name));
        let header = Header {
            version: VERSION,
            key: Cow::Borrowed(&self.key),
            template: Cow::Borrowed(&self.template),
            max_seq_len: self.max_seq_len,
            checksum: checksum(tensors().map(|(_, tensor)| tensor.bytes)),
            report: Cow::Borrowed(&self.report),
        };
        let failed = |error: &dyn std::fmt::Display| DataError::Io {
            path: path.to_path_buf(),
            action: "lay out the prepared file",
            source: std::io::Error::other(error.to_string()),
        };
        let header = serde_json::to_string(&header).map_err(|e| failed(&e))?;
        let metadata = HashMap::from([(MARK.to_owned(), header)]);
        let bytes = safetensors::serialize(tensors(), Some(metadata)).map_err(|e| failed(&e))?;
        files::write_atomically(path, &[&bytes], "write the prepared file")
    }

    /// Reads a file that [`PreparedDataset::write`] wrote. Nothing in it is taken on trust: a foreign, truncated
    /// or damaged file is an error that says so.
    pub fn read(path: &Path) -> Result<Self, DataError> {
        let wrong = |message: String| DataError::Prepared { path: path.to_path_buf(), message };
        let (header, bytes) = read_ours(path)?;
        let Probe { version } =
            serde_json::from_str(&header).map_err(|e| wrong(format!("damaged header: {e}")))?;
        if version != VERSION {
            return Err(wrong(format!("written in format {version}, this pronk reads format {VERSION}")));
        }
        let header: Header<'_> =
            serde_json::from_str(&header).map_err(|e| wrong(format!("damaged header: {e}")))?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(|e| {
            wrong(format!("truncated or damaged: its header does not fit its {} bytes ({e})", bytes.len()))
        })?;
        let found = decode_all(&tensors, &header).map_err(wrong)?;
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
    file.by_ref().take(8).read_to_end(&mut bytes).map_err(io)?;
    let Ok(size) = <[u8; 8]>::try_from(bytes.as_slice()).map(u64::from_le_bytes) else {
        return Err(wrong("not a prepared dataset: shorter than 8 bytes"));
    };
    if size > MAX_HEADER {
        return Err(wrong(&format!("not a prepared dataset: its header claims {size} bytes")));
    }
    // `take` bounds the read by what the file really holds, whatever the header claims.
    file.by_ref().take(size).read_to_end(&mut bytes).map_err(io)?;
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

fn decode_all(tensors: &SafeTensors<'_>, header: &Header<'_>) -> Result<PreparedDataset, String> {
    let train = Encoded::find(tensors, "train")?;
    let validation = Encoded::find(tensors, "validation")?;
    let parts = [("train", &train), ("validation", &validation)];
    let found =
        checksum(parts.iter().flat_map(|(name, part)| part.tensors(name)).map(|(_, tensor)| tensor.bytes));
    if found != header.checksum {
        return Err(format!("damaged: checksum {found}, expected {}", header.checksum));
    }
    Ok(PreparedDataset {
        key: header.key.to_string(),
        train: train.decode("train", header.max_seq_len)?,
        validation: validation.decode("validation", header.max_seq_len)?,
        report: header.report.clone().into_owned(),
        template: header.template.to_string(),
        max_seq_len: header.max_seq_len,
    })
}

fn checksum<'a>(parts: impl Iterator<Item = &'a [u8]>) -> String {
    let mut hasher = Sha256::new();
    for part in parts {
        files::hash_field(&mut hasher, part);
    }
    files::hex(hasher)
}

/// [`Rows`] as the little-endian bytes of three tensors.
struct Encoded<'a> {
    token_ids: Cow<'a, [u8]>,
    loss_mask: Cow<'a, [u8]>,
    offsets: Cow<'a, [u8]>,
}

impl<'a> Encoded<'a> {
    fn new(rows: &Rows) -> Self {
        Self {
            token_ids: rows.token_ids.iter().flat_map(|id| id.to_le_bytes()).collect(),
            loss_mask: rows.loss_mask.iter().map(|&label| u8::from(label)).collect(),
            offsets: rows.offsets.iter().flat_map(|&offset| (offset as u64).to_le_bytes()).collect(),
        }
    }

    /// Name and content of each tensor; the order is that of the checksum.
    fn tensors(&self, part: &str) -> [(String, Tensor<'_>); 3] {
        [
            (format!("{part}.token_ids"), Tensor::new(Dtype::U32, 4, &self.token_ids)),
            (format!("{part}.loss_mask"), Tensor::new(Dtype::U8, 1, &self.loss_mask)),
            (format!("{part}.offsets"), Tensor::new(Dtype::U64, 8, &self.offsets)),
        ]
    }

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
            Ok(Cow::Borrowed(tensor.data()))
        };
        Ok(Self {
            token_ids: find("token_ids", Dtype::U32)?,
            loss_mask: find("loss_mask", Dtype::U8)?,
            offsets: find("offsets", Dtype::U64)?,
        })
    }

    /// The rows, if they are rows: every offset in range and above the one before, every mark 0 or 1, no label
    /// on a first token, none longer than `max_seq_len`.
    fn decode(&self, part: &str, max_seq_len: usize) -> Result<Rows, String> {
        let token_ids: Vec<u32> =
            self.token_ids.as_chunks().0.iter().map(|&b| u32::from_le_bytes(b)).collect();
        if self.loss_mask.len() != token_ids.len() {
            let (marks, tokens) = (self.loss_mask.len(), token_ids.len());
            return Err(format!("damaged: {part} has {marks} label marks for {tokens} tokens"));
        }
        if let Some(at) = self.loss_mask.iter().position(|&mark| mark > 1) {
            return Err(format!("damaged: {part}.loss_mask[{at}] is neither 0 nor 1"));
        }
        let loss_mask: Vec<bool> = self.loss_mask.iter().map(|&mark| mark == 1).collect();
        let offsets = self.decode_offsets(part, token_ids.len(), max_seq_len)?;
        let labelled = |&start: &usize| loss_mask.get(start).copied().unwrap_or(false);
        if let Some(row) = offsets.iter().position(labelled) {
            return Err(format!("damaged: {part} row {row} has a label on its first token"));
        }
        Ok(Rows { token_ids, loss_mask, offsets })
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

/// A vector for safetensors to write.
struct Tensor<'a> {
    dtype: Dtype,
    shape: [usize; 1],
    bytes: &'a [u8],
}

impl<'a> Tensor<'a> {
    fn new(dtype: Dtype, width: usize, bytes: &'a [u8]) -> Self {
        Self { dtype, shape: [bytes.len() / width], bytes }
    }
}

impl View for Tensor<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}
