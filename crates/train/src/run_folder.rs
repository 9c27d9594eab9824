use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use atomic_write_file::AtomicWriteFile;
use serde::Serialize;

use crate::TrainError;

/// The folder of one run. Whatever lies in it is whole at any moment: files are written beside
/// their names, synced, and renamed.
#[derive(Debug, Clone)]
pub struct RunFolder {
    root: PathBuf,
}

impl RunFolder {
    /// The folder for a new run. A folder that holds a run already is refused.
    pub fn create(root: &Path) -> Result<Self, TrainError> {
        let folder = Self { root: root.into() };
        if folder.metrics().exists() || folder.checkpoints().exists() {
            return Err(TrainError::RunExists(root.into()));
        }
        fs::create_dir_all(root).map_err(TrainError::io(root))?;
        Ok(folder)
    }

    /// The folder of a run that is there.
    pub fn open(root: &Path) -> Result<Self, TrainError> {
        let folder = Self { root: root.into() };
        fs::metadata(folder.recipe()).map_err(TrainError::io(&folder.recipe()))?;
        Ok(folder)
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The recipe, with every default filled in.
    pub fn recipe(&self) -> PathBuf {
        self.root.join("recipe.toml")
    }

    /// One JSON object a step.
    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// Prompts and their answers.
    pub fn samples(&self) -> PathBuf {
        self.root.join("samples.md")
    }

    /// The adapter to use.
    pub fn adapter(&self) -> PathBuf {
        self.root.join("adapter")
    }

    /// States to go on from.
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// Writes a file of the run whole.
    pub fn write(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
        let write = || {
            let mut file = AtomicWriteFile::open(path)?;
            file.write_all(bytes)?;
            file.commit()
        };
        write().map_err(TrainError::io(path))
    }

    /// Adds a line to `metrics.jsonl`.
    pub(crate) fn log(&self, record: &impl Serialize) -> Result<(), TrainError> {
        let path = self.metrics();
        let append = || {
            let mut line = serde_json::to_vec(record)?;
            line.push(b'\n');
            let mut file = fs::OpenOptions::new().create(true).append(true).open(&path)?;
            let before = file.metadata()?.len();
            // Half a line, as a full disk leaves it, would be taken for a record.
            file.write_all(&line).inspect_err(|_| drop(file.set_len(before)))
        };
        append().map_err(TrainError::io(&path))
    }

    /// Drops the lines of `metrics.jsonl` that come after `step`: a run that goes on from a
    /// checkpoint writes them again.
    pub(crate) fn rewind_log(&self, step: u64) -> Result<(), TrainError> {
        let path = self.metrics();
        let text = match fs::read_to_string(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            text => text.map_err(TrainError::io(&path))?,
        };
        let kept = |line: &&str| {
            let record: Option<serde_json::Value> = serde_json::from_str(line).ok();
            record.and_then(|r| r["step"].as_u64()).is_some_and(|s| s <= step)
        };
        let lines: String = text.lines().filter(kept).flat_map(|line| [line, "\n"]).collect();
        Self::write(&path, lines.as_bytes())
    }
}
