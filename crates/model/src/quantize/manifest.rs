//! What a directory of the cache says about itself, so that nothing but the whole is ever trusted.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::key::Key;
use crate::fingerprint::hex;
use crate::{Base, ModelError, Staging};

/// Its file name.
const NAME: &str = "pronk_cache.json";
/// Bytes that are hashed by themselves, so that several threads can share a file.
const PART: u64 = 1 << 26;

#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    /// What it was made of.
    key: String,
    /// Where that lay, for people who look into their cache.
    base: PathBuf,
    /// What the files hold.
    files: BTreeMap<String, Content>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Content {
    bytes: u64,
    /// SHA-256 of every 64 MiB.
    sha256: Vec<String>,
}

impl Content {
    fn of(path: &Path) -> io::Result<Self> {
        let bytes = fs::metadata(path)?.len();
        let parts = (0..bytes.div_ceil(PART)).into_par_iter();
        let sha256 = parts.map(|part| sha256_at(path, part * PART)).collect::<io::Result<_>>()?;
        Ok(Self { bytes, sha256 })
    }
}

/// Of a part of a file. It is read, not mapped: what is mapped counts as memory of ours.
fn sha256_at(path: &Path, start: u64) -> io::Result<String> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(start))?;
    let mut hash = Sha256::new();
    io::copy(&mut file.take(PART), &mut hash)?;
    Ok(hex(hash))
}

/// Writes the manifest of all that is in `staging`.
pub fn write(staging: &Staging, key: &Key, base: &Base) -> Result<(), ModelError> {
    let list = || {
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(staging.path())? {
            let entry = entry?;
            files.insert(entry.file_name().to_string_lossy().into_owned(), Content::of(&entry.path())?);
        }
        Ok(files)
    };
    let files = list().map_err(ModelError::io(staging.destination()))?;
    let base = fs::canonicalize(&base.path).unwrap_or_else(|_| base.path.clone());
    let manifest = Manifest { key: key.text().to_owned(), base, files };
    let json = serde_json::to_string_pretty(&manifest);
    let json = json.map_err(|e| ModelError::malformed(&staging.destination().join(NAME), e.to_string()))?;
    staging.add_file(NAME, format!("{json}\n").as_bytes())
}

/// Whether `dir` holds what `key` stands for; if not, why.
pub fn check(dir: &Path, key: &Key) -> Result<(), String> {
    let text = fs::read(dir.join(NAME)).map_err(|e| format!("{NAME} cannot be read ({e})"))?;
    let manifest: Manifest =
        serde_json::from_slice(&text).map_err(|e| format!("{NAME} is no manifest ({e})"))?;
    if manifest.key != key.text() {
        return Err(format!("it was made of another base, {}", manifest.base.display()));
    }
    for (name, expected) in &manifest.files {
        let length = fs::metadata(dir.join(name)).map_err(|e| format!("{name}: {e}"))?.len();
        if length != expected.bytes {
            return Err(format!("{name}: expected {} bytes, found {length}", expected.bytes));
        }
        if Content::of(&dir.join(name)).map_err(|e| format!("{name}: {e}"))? != *expected {
            return Err(format!("{name}: it is not what was written"));
        }
    }
    Ok(())
}
