//! A directory that is whole, or not there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::ModelError;

/// What this process has not published yet, for [`Staging::abandon_all`].
static UNPUBLISHED: Mutex<Vec<Unpublished>> = Mutex::new(Vec::new());

/// A hidden directory beside its destination, and gone with all it holds unless published.
///
/// What is written in it is not named by its passing path: see [`Staging::destination`].
#[derive(Debug)]
pub struct Staging {
    path: PathBuf,
    destination: PathBuf,
}

/// What is to be removed.
#[derive(Debug)]
struct Unpublished {
    /// The staging directory.
    path: PathBuf,
    /// Directories above the destination that were not there before, topmost first.
    created: Vec<PathBuf>,
}

impl Staging {
    /// Makes the directories above the destination `out`, which must not exist or be empty, and
    /// the staging directory in them. A destination that lies in the directory `base` is refused.
    pub fn beside(out: &Path, base: Option<&Path>) -> Result<Self, ModelError> {
        let refuse = |problem: String| ModelError::Destination { path: out.into(), problem };
        let (existing, missing) = resolve(out)?;
        if let Some(base) = base {
            let base = fs::canonicalize(base).map_err(ModelError::io(base))?;
            if existing.starts_with(&base) {
                return Err(refuse(format!(
                    "it lies in the base {}, which is left as it is; choose a directory elsewhere",
                    base.display()
                )));
            }
        }
        if missing.is_empty() {
            check_empty(&existing).map_err(refuse)?;
        }
        let mut destination = existing;
        let mut created = Vec::new();
        for name in &missing {
            destination.push(name);
            created.push(destination.clone());
        }
        created.pop(); // the destination itself comes by renaming
        let parent = destination
            .parent()
            .ok_or_else(|| refuse("it is the root directory; choose a directory below it".into()))?
            .to_owned();
        if is_mount_point(&destination, &parent) {
            return Err(refuse("nothing can be renamed to a mount point; choose a directory in it".into()));
        }
        let path = Unpublished::begin(created, &parent)?;
        Ok(Self { path, destination })
    }

    /// Removes all that this process has not published, and lets it publish nothing any more: for who ends it at a signal,
    /// where nothing is dropped.
    pub fn abandon_all() {
        let unpublished = unpublished();
        unpublished.iter().for_each(Unpublished::remove);
        std::mem::forget(unpublished); // whoever would publish waits for the end
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where it will be, which is what errors name: the staging directory is gone by the time
    /// that anybody reads them.
    pub fn destination(&self) -> &Path {
        &self.destination
    }

    /// Writes a small file called `name`, which is not there yet.
    pub fn add_file(&self, name: &str, bytes: &[u8]) -> Result<(), ModelError> {
        let file = File::create_new(self.path.join(name));
        let written = file.and_then(|mut file| file.write_all(bytes));
        written.map_err(ModelError::io(&self.destination.join(name)))
    }

    /// Makes sure that everything is on the disk, and gives it its name.
    pub fn publish(self) -> Result<(), ModelError> {
        sync_files(&self.path, &self.destination)?;
        if cfg!(windows) && self.destination.exists() {
            // Elsewhere a rename replaces an empty directory.
            fs::remove_dir(&self.destination).map_err(ModelError::io(&self.destination))?;
        }
        self.rename().map_err(|e| ModelError::Destination {
            path: self.destination.clone(),
            problem: format!("the finished model cannot be moved there ({e}); choose a new directory"),
        })?;
        self.destination.parent().map_or(Ok(()), sync_dir)
    }

    fn rename(&self) -> io::Result<()> {
        let mut unpublished = unpublished();
        fs::rename(&self.path, &self.destination)?;
        unpublished.retain(|other| other.path != self.path);
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let mut unpublished = unpublished();
        if let Some(at) = unpublished.iter().position(|other| other.path == self.path) {
            unpublished.swap_remove(at).remove();
        }
    }
}

fn unpublished() -> MutexGuard<'static, Vec<Unpublished>> {
    UNPUBLISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Unpublished {
    /// Makes the directories `missing`, and a staging directory in `parent`, the last of them or where they begin.
    fn begin(missing: Vec<PathBuf>, parent: &Path) -> Result<PathBuf, ModelError> {
        let mut all = unpublished();
        let mut new = Self { path: PathBuf::new(), created: Vec::new() };
        let make = || -> Result<PathBuf, ModelError> {
            for dir in missing {
                fs::create_dir(&dir).map_err(ModelError::io(&dir))?;
                new.created.push(dir);
            }
            Ok(builder().tempdir_in(parent).map_err(ModelError::io(parent))?.keep())
        };
        match make() {
            Ok(path) => {
                new.path.clone_from(&path);
                all.push(new);
                Ok(path)
            }
            Err(error) => {
                new.remove();
                Err(error)
            }
        }
    }

    fn remove(&self) {
        let is_filled_again =
            || fs::remove_dir_all(&self.path).is_err_and(|e| e.kind() == io::ErrorKind::DirectoryNotEmpty);
        // Another thread may be writing in it.
        let _ = (0..100).all(|_| is_filled_again());
        for dir in self.created.iter().rev() {
            // Somebody else may have put something there by now; then it stays.
            let _ = fs::remove_dir(dir);
        }
    }
}

/// `path` as the directory on its way that exists, without links, and what is missing below it.
fn resolve(path: &Path) -> Result<(PathBuf, Vec<PathBuf>), ModelError> {
    let mut existing = std::path::absolute(path).map_err(ModelError::io(path))?;
    let mut missing = Vec::new();
    while fs::symlink_metadata(&existing).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
        let (Some(name), Some(parent)) = (existing.file_name(), existing.parent()) else {
            let problem = "a '..' stands behind a directory that does not exist".to_owned();
            return Err(ModelError::Destination { path: path.into(), problem });
        };
        missing.insert(0, PathBuf::from(name));
        existing = parent.into();
    }
    let existing = fs::canonicalize(&existing).map_err(ModelError::io(&existing))?;
    Ok((existing, missing))
}

fn check_empty(dir: &Path) -> Result<(), String> {
    let expected = "expected a path that does not exist, or an empty directory";
    let choose = "choose another path, or remove what is there";
    match fs::read_dir(dir).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Ok(()),
        Ok(false) => Err(format!("{expected}, found a directory with something in it; {choose}")),
        Err(_) if dir.is_file() => Err(format!("{expected}, found a file; {choose}")),
        Err(e) => Err(format!("{expected}, found one that cannot be read ({e}); {choose}")),
    }
}

/// Whether `dir` is there, on another file system than its parent.
#[cfg(unix)]
fn is_mount_point(dir: &Path, parent: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = |path| fs::metadata(path).map(|m| m.dev());
    matches!((device(dir), device(parent)), (Ok(here), Ok(above)) if here != above)
}

#[cfg(not(unix))]
fn is_mount_point(_: &Path, _: &Path) -> bool {
    false
}

/// A finished model is as readable as any directory that its owner makes.
fn builder() -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".pronk-");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777)); // less the umask
    builder
}

/// Syncs all that is in `dir`, which errors call `shown`.
fn sync_files(dir: &Path, shown: &Path) -> Result<(), ModelError> {
    for entry in fs::read_dir(dir).map_err(ModelError::io(shown))? {
        let entry = entry.map_err(ModelError::io(shown))?;
        let (path, shown) = (entry.path(), shown.join(entry.file_name()));
        if path.is_dir() {
            sync_files(&path, &shown)?;
        } else {
            // Windows syncs only what is opened for writing.
            let file = OpenOptions::new().read(true).write(cfg!(windows)).open(&path);
            file.and_then(|f| f.sync_all()).map_err(ModelError::io(&shown))?;
        }
    }
    sync_dir(dir)
}

/// Makes a directory's entries durable, where a directory can be opened.
fn sync_dir(dir: &Path) -> Result<(), ModelError> {
    if cfg!(unix) {
        File::open(dir).and_then(|d| d.sync_all()).map_err(ModelError::io(dir))?;
    }
    Ok(())
}
