//! What a directory of the cache says about itself, so that nothing but the whole is ever trusted.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::key::Key;
use crate::{Base, ModelError, Staging};

/// Its file name.
const NAME: &str = "pronk_cache.json";

#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    /// What it was made of.
    key: String,
    /// Where that lay, for people who look into their cache.
    base: PathBuf,
    /// Lengths of the files.
    files: BTreeMap<String, u64>,
}

/// Writes the manifest of all that is in `staging`.
pub fn write(staging: &Staging, key: &Key, base: &Base) -> Result<(), ModelError> {
    let list = || {
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(staging.path())? {
            let entry = entry?;
            files.insert(entry.file_name().to_string_lossy().into_owned(), entry.metadata()?.len());
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
        match fs::metadata(dir.join(name)) {
            Ok(found) if found.len() == *expected => {}
            Ok(found) => return Err(format!("{name}: expected {expected} bytes, found {}", found.len())),
            Err(e) => return Err(format!("{name}: {e}")),
        }
    }
    Ok(())
}
