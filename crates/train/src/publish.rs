//! A folder that others read is replaced as a whole: whoever looks finds the old one or the new one.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::TrainError;
use crate::manifest::Manifest;

/// What a killed process may leave: a folder on its way out of another's place, on its way out for good,
/// and on its way in.
const LEFT_OVERS: [&str; 3] = ["old", "removed", "partial"];

/// Has a folder filled beside `dest`, adds its manifest, and puts it in the place of `dest`. What
/// `fill` writes has to be synced.
pub(crate) fn publish(
    dest: &Path,
    fill: impl FnOnce(&Path) -> Result<(), TrainError>,
) -> Result<(), TrainError> {
    let partial = beside(dest, "partial");
    let publish = || {
        remove(&partial)?;
        fs::create_dir_all(&partial).map_err(TrainError::io(&partial))?;
        fill(&partial)?;
        Manifest::of_folder(&partial)?.write(&partial)?;
        put(&partial, dest).map_err(TrainError::io(dest))
    };
    publish().inspect_err(|_| {
        // What cannot be removed either is removed before the next one.
        let _ = fs::remove_dir_all(&partial);
    })
}

/// Removes a folder that others read: from one moment to the next it is not there.
pub(crate) fn withdraw(dest: &Path) -> Result<(), TrainError> {
    let removed = beside(dest, "removed");
    remove(&removed)?;
    fs::rename(dest, &removed).map_err(TrainError::io(dest))?;
    remove(&removed)
}

/// Clears away what a process that was killed has left beside `dest`.
pub(crate) fn recover(dest: &Path) -> Result<(), TrainError> {
    let old = beside(dest, "old");
    if old.exists() && !dest.exists() {
        fs::rename(&old, dest).map_err(TrainError::io(dest))?;
    }
    LEFT_OVERS.into_iter().try_for_each(|what| remove(&beside(dest, what)))
}

/// The same for all folders in `dir`.
pub(crate) fn recover_all(dir: &Path) -> Result<(), TrainError> {
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let name = entry.map_err(TrainError::io(dir))?.file_name().to_string_lossy().into_owned();
        let of = |what: &&str| name.strip_prefix('.')?.strip_suffix(&format!(".{what}"));
        if let Some(dest) = LEFT_OVERS.iter().find_map(of) {
            recover(&dir.join(dest))?;
        }
    }
    Ok(())
}

/// A hidden name beside `dest`.
fn beside(dest: &Path, what: &str) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(dest.file_name().unwrap_or_default());
    name.push(format!(".{what}"));
    dest.with_file_name(name)
}

fn remove(dir: &Path) -> Result<(), TrainError> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(TrainError::io(dir)(e)),
        _ => Ok(()),
    }
}

fn put(new: &Path, dest: &Path) -> io::Result<()> {
    if !dest.exists() {
        fs::rename(new, dest)?;
        return sync_parent(dest);
    }
    if exchange(new, dest).is_ok() {
        sync_parent(dest)?;
        return fs::remove_dir_all(new); // it is the old one now
    }
    // Where two names cannot change places, a moment remains in which there is only the old one,
    // under another name: `recover` takes it back.
    let old = beside(dest, "old");
    fs::rename(dest, &old)?;
    fs::rename(new, dest)?;
    sync_parent(dest)?;
    fs::remove_dir_all(old)
}

/// Two names change places in one moment.
#[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    Ok(renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)?)
}

#[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
fn exchange(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Makes a folder's entries durable, where a folder can be opened.
fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if cfg!(unix) => File::open(parent)?.sync_all(),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::differences;

    fn fill(text: &str) -> impl FnOnce(&Path) -> Result<(), TrainError> {
        move |dir| fs::write(dir.join("a"), text).map_err(TrainError::io(dir))
    }

    #[test]
    fn a_folder_is_replaced_as_a_whole_and_nothing_stays_beside() {
        let dir = tempfile::tempdir().unwrap();
        let dest = dir.path().join("adapter");
        for text in ["old", "new"] {
            publish(&dest, fill(text)).unwrap();
            assert_eq!(fs::read_to_string(dest.join("a")).unwrap(), text);
            assert_eq!(differences(&dest), []);
        }
        let failed = publish(&dest, |_| Err(TrainError::NoRows));
        assert!(failed.is_err());
        assert_eq!(fs::read_to_string(dest.join("a")).unwrap(), "new");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        withdraw(&dest).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_process_left_is_taken_back_or_cleared_away() {
        let dir = tempfile::tempdir().unwrap();
        let dest = dir.path().join("adapter");
        publish(&dest, fill("old")).unwrap();
        fs::rename(&dest, beside(&dest, "old")).unwrap();
        fs::create_dir(beside(&dest, "partial")).unwrap();
        fs::create_dir(beside(&dest, "removed")).unwrap();
        recover_all(dir.path()).unwrap();
        assert_eq!(differences(&dest), []);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
