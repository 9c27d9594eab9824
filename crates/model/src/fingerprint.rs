//! A short name for a base's content, to tell whether it is still the same.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::{Base, ModelError};

/// Places of a weight file that are looked at, evenly spread.
const WINDOWS: u64 = 256;
/// Bytes at each of them.
const WINDOW: u64 = 4096;

impl Base {
    /// SHA-256 over the configuration, and of every weight file its name, its length, its header and 256 samples of
    /// 4 KiB: other weights are told from these within milliseconds, however large they are; a few numbers that
    /// were changed between two samples are not. A file's time of change is left out, so that a copy is the same base.
    pub fn fingerprint(&self) -> Result<String, ModelError> {
        let mut hash = Sha256::new();
        let mut field = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        if self.gguf().is_none() {
            let path = self.path.join("config.json");
            field(&fs::read(&path).map_err(ModelError::io(&path))?);
        }
        for (path, header) in self.headers() {
            field(path.file_name().unwrap_or_default().as_encoded_bytes());
            field(header);
            sample(&path, &mut field).map_err(ModelError::io(&path))?;
        }
        Ok(hex(hash))
    }
}

/// Lower-case hexadecimal of a finished SHA-256.
pub fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sample(path: &Path, field: &mut impl FnMut(&[u8])) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    field(&length.to_le_bytes());
    let last = length.saturating_sub(WINDOW);
    let mut seen = None;
    for window in 0..WINDOWS {
        let start = (u128::from(last) * u128::from(window) / u128::from(WINDOWS - 1)) as u64;
        if seen == Some(start) {
            continue;
        }
        seen = Some(start);
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(start))?;
        Read::by_ref(&mut file).take(WINDOW).read_to_end(&mut bytes)?;
        field(&bytes);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_weights_are_another_base_and_a_copy_is_not() {
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/tiny-gqa");
        let dir = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(golden).unwrap() {
            let from = entry.unwrap().path();
            fs::write(dir.path().join(from.file_name().unwrap()), fs::read(&from).unwrap()).unwrap();
        }
        let print = |dir: &Path| Base::open(dir).unwrap().fingerprint().unwrap();
        let theirs = print(Path::new(golden));
        assert_eq!(print(dir.path()), theirs);
        let weights = dir.path().join("model.safetensors");
        let whole = fs::read(&weights).unwrap();
        for at in [whole.len() - 1, whole.len() / 2] {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            fs::write(&weights, changed).unwrap();
            assert_ne!(print(dir.path()), theirs, "byte {at}");
        }
        fs::write(&weights, whole).unwrap();
        let config = dir.path().join("config.json");
        let text = fs::read_to_string(&config).unwrap();
        fs::write(&config, text + " ").unwrap();
        assert_ne!(print(dir.path()), theirs);
    }
}
