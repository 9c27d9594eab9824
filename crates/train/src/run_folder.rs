use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use crate::TrainError;
use crate::manifest::{Content, MANIFEST, Manifest};
use crate::publish::{recover, recover_all};

const METRICS: &str = "metrics.jsonl";
const SAMPLES: &str = "samples.md";
/// What a process holds while it works in the folder. The system takes it from a dead one.
const LOCK: &str = ".lock";

/// The folder of one run, held by this process. Whatever lies in it is whole at any moment: files are
/// written beside their names, synced, and renamed. `manifest.json` has their hashes.
#[derive(Debug, Clone)]
pub struct RunFolder {
    root: PathBuf,
    /// `None` for one who only looks.
    _lock: Option<Arc<File>>,
}

impl RunFolder {
    /// The files that a run makes in its folder, beside the adapter and the checkpoints.
    pub const FILES: [&str; 8] = [
        "recipe.toml",
        "lock.json",
        "prepared.safetensors",
        METRICS,
        SAMPLES,
        "not_finite.json",
        MANIFEST,
        LOCK,
    ];

    /// The folder for a new run. A folder that holds a run already is refused.
    pub fn create(root: &Path) -> Result<Self, TrainError> {
        let folder = Self::look(root);
        if folder.metrics().exists() || folder.checkpoints().exists() {
            return Err(TrainError::RunExists(root.into()));
        }
        fs::create_dir_all(root).map_err(TrainError::io(root))?;
        folder.locked()
    }

    /// The folder of a run that is there, to go on with. What a killed process left half-done is cleared away.
    pub fn open(root: &Path) -> Result<Self, TrainError> {
        let folder = Self::look(root);
        fs::metadata(folder.recipe()).map_err(TrainError::io(&folder.recipe()))?;
        let folder = folder.locked()?;
        folder.clear_left_overs()?;
        Manifest::read(root)
            .map_err(|problem| TrainError::Manifest { path: root.join(MANIFEST), problem })?;
        Ok(folder)
    }

    /// A folder that is only read, whoever works in it.
    pub fn look(root: &Path) -> Self {
        Self { root: root.into(), _lock: None }
    }

    fn locked(self) -> Result<Self, TrainError> {
        let path = self.root.join(LOCK);
        let file = File::options().create(true).append(true).open(&path).map_err(TrainError::io(&path))?;
        match file.try_lock() {
            Ok(()) => Ok(Self { _lock: Some(Arc::new(file)), ..self }),
            Err(TryLockError::WouldBlock) => Err(TrainError::InUse(self.root)),
            // Some file systems over a network have no locks; a run without one is better than none.
            Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => Ok(self),
            Err(TryLockError::Error(e)) => Err(TrainError::io(&path)(e)),
        }
    }

    fn clear_left_overs(&self) -> Result<(), TrainError> {
        recover(&self.adapter())?;
        recover_all(&self.checkpoints())?;
        for entry in fs::read_dir(&self.root).map_err(TrainError::io(&self.root))? {
            let path = entry.map_err(TrainError::io(&self.root))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            // `AtomicWriteFile` writes to names such as `.recipe.toml.Ab3dEf`.
            let random = |of: &&str| name.strip_prefix('.')?.strip_prefix(of)?.strip_prefix('.');
            if Self::FILES.iter().filter_map(random).any(|random| random.len() == 6) {
                fs::remove_file(&path).map_err(TrainError::io(&path))?;
            }
        }
        Ok(())
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
        self.root.join(METRICS)
    }

    /// Prompts and their answers.
    pub fn samples(&self) -> PathBuf {
        self.root.join(SAMPLES)
    }

    /// The adapter to use.
    pub fn adapter(&self) -> PathBuf {
        self.root.join("adapter")
    }

    /// States to go on from.
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// Writes a file whole, to a temporary name beside it, synced and renamed; then reads it back.
    pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), TrainError> {
        pronk_files::write(path, bytes).map_err(TrainError::io(path))
    }

    /// Writes the file called `name` of the run whole. Its hash goes into the manifest before, beside
    /// that of what is replaced, so that the two agree whenever the process ends.
    pub fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), TrainError> {
        let path = self.root.join(name);
        let Ok(replaced) = Content::of_file(&path) else {
            // Of a file that is not there yet the manifest must not speak before it is.
            return self.replace_by(name, |path| Self::write(path, bytes));
        };
        let mut manifest = self.manifest();
        manifest.set(name, vec![replaced, Content::of(bytes)]);
        manifest.write(&self.root)?;
        Self::write(&path, bytes)
    }

    /// Has `write` write the file called `name` of the run, whole, and notes its hash.
    pub fn replace_by<E: From<TrainError>>(
        &self,
        name: &str,
        write: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut manifest = self.manifest();
        manifest.forget(name);
        manifest.write(&self.root)?;
        let path = self.root.join(name);
        write(&path)?;
        manifest.set(name, vec![Content::of_file(&path).map_err(TrainError::io(&path))?]);
        Ok(manifest.write(&self.root)?)
    }

    /// One that is damaged while the run goes on costs what it said, not the run.
    fn manifest(&self) -> Manifest {
        Manifest::read(&self.root).ok().flatten().unwrap_or_default()
    }

    /// Adds a line to `metrics.jsonl`.
    pub(crate) fn log(&self, record: &impl Serialize) -> Result<(), TrainError> {
        let path = self.metrics();
        let append = || {
            let mut line = serde_json::to_vec(record)?;
            line.push(b'\n');
            let mut file = File::options().create(true).append(true).open(&path)?;
            let before = file.metadata()?.len();
            // Half a line, as a full disk leaves it, would be taken for a record.
            file.write_all(&line).inspect_err(|_| drop(file.set_len(before)))
        };
        append().map_err(TrainError::io(&path))
    }

    /// Makes the lines of `metrics.jsonl` durable, and notes their hash.
    pub(crate) fn seal_log(&self) -> Result<(), TrainError> {
        let path = self.metrics();
        let seal = || File::options().append(true).open(&path)?.sync_all();
        match seal() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            sealed => sealed.map_err(TrainError::io(&path))?,
        }
        let mut manifest = self.manifest();
        manifest.set(METRICS, vec![Content::of_file(&path).map_err(TrainError::io(&path))?]);
        manifest.settle(&self.root);
        manifest.write(&self.root)
    }

    /// Drops the lines of `metrics.jsonl` that come after `step`, as a run that goes on from there writes them
    /// again. Before the first step (`None`) that is every line.
    pub(crate) fn rewind_log(&self, step: Option<u64>) -> Result<(), TrainError> {
        let path = self.metrics();
        let text = match fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            text => text.map_err(TrainError::io(&path))?,
        };
        // A line that the system lost half of is no record, whatever its bytes are.
        let text = String::from_utf8_lossy(&text);
        let kept = |line: &&str| step_of(line).zip(step).is_some_and(|(at, step)| at <= step);
        let lines: String = text.lines().filter(kept).flat_map(|line| [line, "\n"]).collect();
        if lines == text { Ok(()) } else { self.replace(METRICS, lines.as_bytes()) }
    }

    /// The last step that `metrics.jsonl` tells of; 0 where it tells of none.
    pub(crate) fn last_logged_step(&self) -> u64 {
        let text = fs::read(self.metrics()).unwrap_or_default();
        String::from_utf8_lossy(&text).lines().filter_map(step_of).max().unwrap_or(0)
    }
}

fn step_of(line: &str) -> Option<u64> {
    let record: serde_json::Value = serde_json::from_str(line).ok()?;
    record["step"].as_u64()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::differences;

    #[test]
    fn two_cannot_hold_one_folder() {
        let dir = tempfile::tempdir().unwrap();
        let folder = RunFolder::create(dir.path()).unwrap();
        assert!(matches!(RunFolder::create(dir.path()), Err(TrainError::InUse(_))));
        let clone = folder.clone();
        drop(folder);
        assert!(RunFolder::create(dir.path()).is_err());
        drop(clone);
        RunFolder::create(dir.path()).unwrap();
    }

    /// Whatever was written when the process ends, the manifest does not call it damaged.
    #[test]
    fn the_manifest_agrees_with_the_files_at_any_moment() {
        let dir = tempfile::tempdir().unwrap();
        let folder = RunFolder::create(dir.path()).unwrap();
        folder.replace("samples.md", b"one").unwrap();
        let before = fs::read(folder.samples()).unwrap();
        folder.replace("samples.md", b"two").unwrap();
        assert_eq!(differences(dir.path()), []);
        fs::write(folder.samples(), &before).unwrap();
        assert_eq!(differences(dir.path()), [], "as if killed after the manifest was written");
        folder.replace("samples.md", b"three").unwrap();
        fs::write(folder.samples(), &before).unwrap();
        assert_eq!(differences(dir.path()), [], "and once more");
        fs::write(folder.samples(), b"two").unwrap();
        assert_eq!(differences(dir.path()).len(), 1);
    }

    #[test]
    fn a_torn_line_of_the_log_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let folder = RunFolder::create(dir.path()).unwrap();
        let whole = b"{\"step\":0}\n{\"step\":1}\n";
        for torn in [&b"{\"st"[..], b"\xff\x00\xff", b"{\"step\":2}\n{\"step\":", b"\0\0\0\0"] {
            fs::write(folder.metrics(), [&whole[..], torn].concat()).unwrap();
            folder.rewind_log(Some(1)).unwrap();
            assert_eq!(fs::read(folder.metrics()).unwrap(), whole);
        }
        assert_eq!(folder.last_logged_step(), 1);
        folder.rewind_log(None).unwrap();
        assert_eq!(fs::read(folder.metrics()).unwrap(), b"");
    }

    #[test]
    fn what_a_killed_process_left_is_cleared_away() {
        let dir = tempfile::tempdir().unwrap();
        let folder = RunFolder::create(dir.path()).unwrap();
        folder.replace("recipe.toml", b"").unwrap();
        drop(folder);
        for left in [".recipe.toml.Ab3dEf", ".manifest.json.000000"] {
            fs::write(dir.path().join(left), "").unwrap();
        }
        for left in
            ["checkpoints/.step-000002.partial", "checkpoints/.step-000001.removed", ".adapter.partial"]
        {
            fs::create_dir_all(dir.path().join(left)).unwrap();
        }
        for mine in ["notes.txt", ".recipe.toml.swp", "checkpoints/mine"] {
            fs::write(dir.path().join(mine), "").unwrap();
        }
        RunFolder::open(dir.path()).unwrap();
        let names = |dir: PathBuf| {
            let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
            names.sort();
            names
        };
        let root = names(dir.path().into());
        assert_eq!(
            root,
            [".lock", ".recipe.toml.swp", "checkpoints", "manifest.json", "notes.txt", "recipe.toml"]
        );
        assert_eq!(names(dir.path().join("checkpoints")), ["mine"]);
    }
}
