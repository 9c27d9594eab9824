//! What a quantized base in the cache is made of.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde_json::json;
use sha2::{Digest, Sha256};

use super::Quantization;
use crate::fingerprint::hex;
use crate::{Base, ModelError};

/// Counted up whenever the same base would become other files.
const FORMAT_VERSION: u32 = 2;

/// Small files of a base that go along, so that what is in the cache is a base of its own.
const COMPANIONS: [&str; 9] = [
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
];

/// Names a base, as it is now, quantized.
///
/// It hashes every file's name, length and time of change, and the base's fingerprint, which looks at samples of the
/// weights: reading the 26 GB of a 13B takes longer than quantizing them did. The time alone does not tell: images and
/// archives give all their files the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key(String);

impl Key {
    pub fn of(base: &Base, quantization: &Quantization) -> Result<Self, ModelError> {
        let mut hash = Sha256::new();
        let Quantization { scheme, skip_modules } = quantization;
        let whole = json!([FORMAT_VERSION, scheme, base.config.to_json("")]);
        hash.update(whole.to_string());
        if !skip_modules.is_empty() {
            hash.update(json!(skip_modules).to_string());
        }
        hash.update(base.fingerprint()?);
        for (path, _) in base.headers() {
            hash.update(stamp(&path)?);
        }
        for path in companions(base) {
            hash.update(stamp(&path)?);
        }
        Ok(Self(hex(hash)))
    }

    /// The whole key.
    pub fn text(&self) -> &str {
        &self.0
    }

    /// What its directory is called: enough of the key that two never meet, and not more.
    pub fn name(&self) -> &str {
        &self.0[..32]
    }
}

/// Name, length and time of change of a file.
fn stamp(path: &Path) -> Result<String, ModelError> {
    let metadata = fs::metadata(path).map_err(ModelError::io(path))?;
    let changed = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    Ok(json!([path.file_name().map(|n| n.to_string_lossy()), metadata.len(), changed.map(|t| t.as_nanos())])
        .to_string())
}

/// The companions that the base has.
pub fn companions(base: &Base) -> Vec<PathBuf> {
    if base.gguf().is_some() {
        return Vec::new();
    }
    let paths = COMPANIONS.iter().map(|name| base.path.join(name));
    paths.filter(|path| path.is_file()).collect()
}
