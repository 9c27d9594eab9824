//! What a folder's files were when they were written: a hash of each, to be held against what is there.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{RunFolder, TrainError};

/// Its file name.
pub const MANIFEST: &str = "manifest.json";
const VERSION: u32 = 1;
/// More than any manifest of ours takes.
const MAX_BYTES: u64 = 1 << 20;
/// Files that are only ever added to end so. Of such a file the part that was hashed has to be there.
const GROWS: &str = ".jsonl";

/// The hashes of a folder's files. Stored as `manifest.json`, in one spelling alone, so that no
/// change to the manifest itself goes unseen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Manifest {
    version: u32,
    /// By name, what a file may hold: one content, or while it is being replaced the old and the new.
    files: BTreeMap<String, Vec<Content>>,
    /// Of `files`, so that a damaged hash is not taken for a damaged file.
    sha256: String,
}

/// A file's content, or the beginning of one that grows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Content {
    bytes: u64,
    sha256: String,
}

/// A file that is not what its manifest says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The file.
    pub path: PathBuf,
    /// Expected and found.
    pub problem: String,
}

impl Content {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self { bytes: bytes.len() as u64, sha256: hex(Sha256::new().chain_update(bytes)) }
    }

    pub(crate) fn sha256(&self) -> &str {
        &self.sha256
    }

    /// All that is in the file at `path`.
    pub(crate) fn of_file(path: &Path) -> io::Result<Self> {
        Self::of_beginning(path, u64::MAX)
    }

    /// The first `bytes` bytes of the file at `path`, or all where there are fewer.
    fn of_beginning(path: &Path, bytes: u64) -> io::Result<Self> {
        let mut hasher = Sha256::new();
        let bytes = io::copy(&mut File::open(path)?.take(bytes), &mut hasher)?;
        Ok(Self { bytes, sha256: hex(hasher) })
    }

    /// Whether the file at `path` holds it; if not, what was found.
    fn check(&self, path: &Path) -> Result<(), String> {
        let metadata = fs::metadata(path).map_err(|e| e.to_string())?;
        if !metadata.is_file() {
            return Err("expected a file, found a folder, a pipe or a device".to_owned());
        }
        let length = metadata.len();
        let grows = path.to_string_lossy().ends_with(GROWS);
        if length < self.bytes || (length > self.bytes && !grows) {
            return Err(format!("expected {} bytes, found {length}", self.bytes));
        }
        let found = Self::of_beginning(path, self.bytes).map_err(|e| e.to_string())?;
        if found == *self {
            return Ok(());
        }
        Err(format!("expected sha256 {}, found {}", self.sha256, found.sha256))
    }
}

impl Default for Manifest {
    fn default() -> Self {
        Self { version: VERSION, files: BTreeMap::new(), sha256: String::new() }
    }
}

impl Manifest {
    /// Of all files that are in `dir` now.
    pub(crate) fn of_folder(dir: &Path) -> Result<Self, TrainError> {
        let mut manifest = Self::default();
        for entry in fs::read_dir(dir).map_err(TrainError::io(dir))? {
            let path = entry.map_err(TrainError::io(dir))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_file() && name != MANIFEST {
                manifest.set(&name, vec![Content::of_file(&path).map_err(TrainError::io(&path))?]);
            }
        }
        Ok(manifest)
    }

    /// Reads the manifest of `dir`. `None` where there is none; what is wrong with it, where something is.
    pub(crate) fn read(dir: &Path) -> Result<Option<Self>, String> {
        let mut bytes = Vec::new();
        match pronk_files::open(&dir.join(MANIFEST))
            .and_then(|file| file.take(MAX_BYTES).read_to_end(&mut bytes))
        {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read.map_err(|e| e.to_string())?,
        };
        let manifest: Self = serde_json::from_slice(&bytes).map_err(|e| format!("damaged: {e}"))?;
        if manifest.version != VERSION || manifest.clone().into_json() != bytes {
            return Err(format!("damaged: not a manifest as this pronk writes it (version {VERSION})"));
        }
        if let Some(name) = manifest.files.keys().find(|name| !is_plain(name)) {
            return Err(format!("expected names of files in this folder, found {name:?}"));
        }
        Ok(Some(manifest))
    }

    pub(crate) fn write(&self, dir: &Path) -> Result<(), TrainError> {
        RunFolder::write(&dir.join(MANIFEST), &self.clone().into_json())
    }

    fn into_json(mut self) -> Vec<u8> {
        // Strings and numbers alone: nothing that JSON cannot hold.
        self.sha256 = Content::of(&serde_json::to_vec(&self.files).unwrap_or_default()).sha256;
        let mut json = serde_json::to_vec_pretty(&self).unwrap_or_default();
        json.push(b'\n');
        json
    }

    /// From now on `name` holds one of `contents`.
    pub(crate) fn set(&mut self, name: &str, contents: Vec<Content>) {
        self.files.insert(name.to_owned(), contents);
    }

    /// From now on nothing is said of `name`.
    pub(crate) fn forget(&mut self, name: &str) {
        self.files.remove(name);
    }

    /// What every file of `dir` is known to hold, if it holds that, is all that it may hold from now on.
    pub(crate) fn settle(&mut self, dir: &Path) {
        for (name, contents) in &mut self.files {
            if contents.len() > 1
                && let Some(held) = contents.iter().find(|content| content.check(&dir.join(name)).is_ok())
            {
                *contents = vec![held.clone()];
            }
        }
    }

    /// SHA-256 of the file called `name`, where it may hold one content alone.
    pub(crate) fn sha256_of(&self, name: &str) -> Option<&str> {
        match self.files.get(name)?.as_slice() {
            [content] => Some(&content.sha256),
            _ => None,
        }
    }

    /// How many files it speaks of.
    pub(crate) fn files(&self) -> usize {
        self.files.len()
    }

    /// Every file of `dir` that is not what the manifest says.
    pub(crate) fn differences(&self, dir: &Path) -> Vec<Difference> {
        let differs = |(name, contents): (&String, &Vec<Content>)| {
            let path = dir.join(name);
            let problems: Option<Vec<String>> =
                contents.iter().map(|content| content.check(&path).err()).collect();
            let problem = problems?.pop().unwrap_or_default();
            Some(Difference { path, problem })
        };
        self.files.iter().filter_map(differs).collect()
    }
}

/// Every file of `dir` that is not what the manifest in it says. A folder without one differs as a whole.
pub(crate) fn differences(dir: &Path) -> Vec<Difference> {
    let at = |problem| vec![Difference { path: dir.join(MANIFEST), problem }];
    match Manifest::read(dir) {
        Ok(Some(manifest)) => manifest.differences(dir),
        Ok(None) => at("expected the hashes of the files beside it, found no such file".into()),
        Err(problem) => at(problem),
    }
}

/// Whether it is the name of something in a folder, and leads nowhere else.
fn is_plain(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
}

/// SHA-256 of the file at `path`, whatever its size.
pub fn sha256_of_file(path: &Path) -> Result<String, TrainError> {
    Content::of_file(path).map(|content| content.sha256).map_err(TrainError::io(path))
}

/// SHA-256 of `text`.
pub fn sha256_of(text: &str) -> String {
    Content::of(text.as_bytes()).sha256
}

fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.txt"), "wool").unwrap();
        fs::write(dir.path().join("b.jsonl"), "{}\n").unwrap();
        Manifest::of_folder(dir.path()).unwrap().write(dir.path()).unwrap();
        dir
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let dir = folder();
        assert_eq!(differences(dir.path()), []);
        for name in ["a.txt", "b.jsonl", MANIFEST] {
            let path = dir.path().join(name);
            let whole = fs::read(&path).unwrap();
            for bit in 0..8 * whole.len() {
                let mut flipped = whole.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                fs::write(&path, flipped).unwrap();
                let named: Vec<PathBuf> = differences(dir.path()).into_iter().map(|d| d.path).collect();
                assert_eq!(named, std::slice::from_ref(&path), "bit {bit} of {name}");
            }
            fs::write(&path, whole).unwrap();
        }
    }

    #[test]
    fn a_log_may_grow_and_nothing_else_may() {
        let dir = folder();
        fs::write(dir.path().join("b.jsonl"), "{}\n{}\n").unwrap();
        assert_eq!(differences(dir.path()), []);
        fs::write(dir.path().join("b.jsonl"), "{").unwrap();
        fs::write(dir.path().join("a.txt"), "wool and more").unwrap();
        let problems: Vec<String> = differences(dir.path()).into_iter().map(|d| d.problem).collect();
        assert_eq!(problems, ["expected 4 bytes, found 13", "expected 3 bytes, found 1"]);
        fs::remove_file(dir.path().join(MANIFEST)).unwrap();
        assert_eq!(differences(dir.path()).len(), 1);
    }

    #[test]
    fn names_lead_nowhere_else() {
        let dir = folder();
        for name in ["../a.txt", "/etc/passwd", "a/b", "..", ".", "", "a.txt/"] {
            let mut manifest = Manifest::default();
            manifest.set(name, vec![Content::of(b"wool")]);
            manifest.write(dir.path()).unwrap();
            assert!(Manifest::read(dir.path()).unwrap_err().contains("names of files"), "{name}");
        }
    }
}
