use std::path::{Path, PathBuf};

use crate::manifest::{Difference, MANIFEST, Manifest, differences};
use crate::{RunFolder, TrainError, checkpoint};

/// What came of comparing files with the hashes that were taken when they were written.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Verified {
    /// Folders that were looked through, with the number of files in each that have a hash.
    pub folders: Vec<(PathBuf, usize)>,
    /// The files that are not what they were.
    pub differences: Vec<Difference>,
}

impl Verified {
    fn look_through(&mut self, dir: PathBuf) {
        let files = Manifest::read(&dir).ok().flatten().map_or(0, |manifest| manifest.files());
        self.differences.extend(differences(&dir));
        self.folders.push((dir, files));
    }
}

/// Writes down beside all files that are in `dir` now what they hold, for [`verify`].
pub fn seal(dir: &Path) -> Result<(), TrainError> {
    Manifest::of_folder(dir)?.write(dir)
}

/// Takes every hash again of what pronk wrote into `dir`: a run's folder with its adapter and its checkpoints, or one of these alone.
pub fn verify(dir: &Path) -> Result<Verified, TrainError> {
    let folder = RunFolder::look(dir);
    let is_run = folder.recipe().exists() || folder.checkpoints().exists();
    if !is_run && !dir.join(MANIFEST).exists() {
        return Err(TrainError::NothingToVerify(dir.into()));
    }
    let mut verified = Verified::default();
    verified.look_through(dir.into());
    if is_run {
        let adapter =
            Some(folder.adapter()).filter(|adapter| adapter.exists() || checkpoint::has_learned(&folder));
        adapter
            .into_iter()
            .chain(checkpoint::list(&folder).into_values())
            .for_each(|d| verified.look_through(d));
    }
    Ok(verified)
}
