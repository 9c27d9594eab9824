//! Data files, and the rows that are made of them.

use std::sync::LazyLock;

use pronk_data::{Columns, Order, PreparedDataset, RecordFormat, RecordReader, epoch_order};
use safetensors::SafeTensors;
use sha2::{Digest, Sha256};

use crate::folder::Folder;
use crate::texts::TOKENIZER;

/// JSON, JSON Lines and CSV, packed or not.
pub fn records(bytes: &[u8]) {
    let folder = Folder::new();
    for name in ["records.json", "records.csv"] {
        read(&folder, name, bytes);
    }
}

/// Parquet and Arrow.
pub fn tables(bytes: &[u8]) {
    read(&Folder::new(), "records.parquet", bytes);
}

fn read(folder: &Folder, name: &str, bytes: &[u8]) {
    static COLUMNS: LazyLock<Columns> = LazyLock::new(Columns::default);
    let path = folder.write(name, bytes);
    if let Ok(reader) = RecordReader::open(&path, RecordFormat::Auto, &COLUMNS) {
        // A packed column may well hold more records than the file has bytes.
        reader.take(100_000).for_each(drop);
    }
}

pub fn prepared(bytes: &[u8]) {
    let folder = Folder::new();
    let path = folder.write("prepared.safetensors", &sealed(bytes));
    if let Ok(prepared) = PreparedDataset::read(&path) {
        for row in prepared.train.iter().chain(prepared.validation.iter()) {
            assert_eq!(row.token_ids.len(), row.loss_mask.len());
        }
        let _ = pronk_data::check(&prepared, &TOKENIZER);
        let rows = epoch_order(&prepared.mixture, Order::Shuffle, 0, 1);
        assert!(rows.iter().all(|&row| row < prepared.train.len()));
        prepared.write(&path).expect("what was read can be written");
    }
}

/// With the checksum that its header and its rows have: whoever means harm can take one as well.
fn sealed(bytes: &[u8]) -> Vec<u8> {
    const BEFORE: &[u8] = b"checksum\\\":\\\"";
    let mut sealed = bytes.to_vec();
    let Some(header) = unsealed_header(bytes) else { return sealed };
    let place = bytes.windows(BEFORE.len()).position(|window| window == BEFORE).map(|at| at + BEFORE.len());
    let (Some(place), Ok(file)) = (place, SafeTensors::deserialize(bytes)) else { return sealed };
    let mut hasher = Sha256::new();
    hasher.update((header.len() as u64).to_le_bytes());
    hasher.update(header);
    for kind in ["offsets", "token_ids", "loss_mask"] {
        for part in ["train", "validation"] {
            let Ok(tensor) = file.tensor(&format!("{part}.{kind}")) else { return sealed };
            hasher.update((tensor.data().len() as u64).to_le_bytes());
            hasher.update(tensor.data());
        }
    }
    let checksum: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if let Some(old) = sealed.get_mut(place..place + checksum.len()) {
        old.copy_from_slice(checksum.as_bytes());
    }
    sealed
}

/// What a prepared file says beside its rows, with zeros for its checksum.
fn unsealed_header(bytes: &[u8]) -> Option<String> {
    let (_, metadata) = SafeTensors::read_metadata(bytes).ok()?;
    let header = metadata.metadata().as_ref()?.get("pronk.prepared")?;
    let (before, behind) = header.split_once("checksum\":\"")?;
    Some(format!("{before}checksum\":\"{:064}{}", 0, behind.get(64..)?))
}
