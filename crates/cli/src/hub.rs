//! Files of the hub: all of one revision, and taken into the hub's cache only once their hashes are right.

use std::fs::{self, File};
use std::io;
use std::path::{Component, Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder};
use hf_hub::{Cache, Repo, RepoType};
use miette::{IntoDiagnostic, Result, WrapErr, miette};
use pronk_train::sha256_of_file;
use sha1::{Digest, Sha1};

/// Where files lie until their hashes are known, beside the cache that other programs share.
const ARRIVALS: &str = ".pronk-arrivals";

/// A repository of the hub at one commit, whatever its branches come to be.
pub struct Pinned {
    /// The commit.
    pub sha: String,
    /// The names of its files.
    pub files: Vec<String>,
    repo: Repo,
    cache: Cache,
    arrivals: Cache,
    api: Api,
}

impl Pinned {
    /// The repository called `id`, as its `revision`, or its main branch, is now.
    pub fn find(id: &str, kind: RepoType, revision: Option<&str>) -> Result<Self> {
        let cache = Cache::from_env();
        let arrivals = Cache::new(cache.path().join(ARRIVALS));
        let builder = ApiBuilder::from_env().with_cache_dir(arrivals.path().clone()).with_progress(true);
        let api = builder.build().into_diagnostic()?;
        let at = |revision: &str| Repo::with_revision(id.to_owned(), kind, revision.to_owned());
        let info = api.repo(at(revision.unwrap_or("main"))).info().into_diagnostic()?;
        if !is_hash(&info.sha) {
            return Err(miette!("{id}: expected a commit from the hub, found {:?}", info.sha));
        }
        let files = info.siblings.into_iter().map(|file| file.rfilename).collect();
        Ok(Self { repo: at(&info.sha), sha: info.sha, files, cache, arrivals, api })
    }

    /// Where the file called `name` lies in the cache; it is fetched first where it is not there.
    pub fn get(&self, name: &str) -> Result<PathBuf> {
        if !Path::new(name).components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(miette!(
                "{name}: expected a file inside the repository, found a path that leaves it"
            ));
        }
        // Whatever is in the cache was let in by this function, or is another program's to answer for.
        match self.cache.repo(self.repo.clone()).get(name) {
            Some(path) => Ok(path),
            None => self.fetch(name).wrap_err_with(|| name.to_owned()),
        }
    }

    fn fetch(&self, name: &str) -> Result<PathBuf> {
        let remote = self.api.repo(self.repo.clone());
        let told = self.api.metadata(&remote.url(name)).into_diagnostic()?;
        let expected = told.etag();
        if !is_hash(expected) {
            return Err(miette!(
                "expected a hash as the hub's ETag, found {expected:?}; without one the file cannot be trusted. \
                 Download it by other means, and give its path"
            ));
        }
        let blob = self.arrivals.repo(self.repo.clone()).blob_path(expected);
        // What is left of an earlier try is gone on with; there is nothing to go on with where it is all there.
        let part = blob.with_extension("part");
        if fs::metadata(&part).is_ok_and(|part| part.len() >= told.size() as u64) {
            fs::remove_file(&part).into_diagnostic()?;
        }
        // The client stumbles over a link that a killed process has left, and that leads nowhere.
        let left = self.arrivals.repo(self.repo.clone()).pointer_path(&self.sha).join(name);
        if fs::symlink_metadata(&left).is_ok() {
            fs::remove_file(&left).into_diagnostic()?;
        }
        let pointer = remote.download(name).into_diagnostic()?;
        let (kind, found) = hash_like(expected, &pointer)?;
        let arrived = fs::canonicalize(&pointer).into_diagnostic()?;
        if fs::symlink_metadata(&pointer).is_ok_and(|pointer| pointer.is_symlink()) {
            fs::remove_file(&pointer).into_diagnostic()?; // soon it would lead nowhere
        }
        if found != expected {
            fs::remove_file(&arrived).into_diagnostic()?;
            return Err(miette!(
                "what came over the network is damaged: expected {kind} {expected}, found {found}. It was thrown away, \
                 and the cache is as it was; try again"
            ));
        }
        let kept = self.admit(&arrived, expected, name);
        kept.into_diagnostic().wrap_err_with(|| format!("the hub's cache in {}", self.cache.path().display()))
    }

    /// Moves a file that is whole into the cache, in the layout that hub clients share.
    fn admit(&self, arrived: &Path, hash: &str, name: &str) -> io::Result<PathBuf> {
        let repo = self.cache.repo(self.repo.clone());
        let (blob, pointer) = (repo.blob_path(hash), repo.pointer_path(&self.sha).join(name));
        for folder in [&blob, &pointer].into_iter().filter_map(|path| path.parent()) {
            fs::create_dir_all(folder)?;
        }
        File::open(arrived)?.sync_all()?;
        fs::rename(arrived, &blob)?;
        if fs::symlink_metadata(&pointer).is_ok() {
            fs::remove_file(&pointer)?;
        }
        link(&blob, &pointer, name, hash)?;
        repo.create_ref(&self.sha)?;
        Ok(pointer)
    }
}

/// Makes `pointer` lead to `blob` in a way that outlives a move of the cache.
#[cfg(unix)]
fn link(_blob: &Path, pointer: &Path, name: &str, hash: &str) -> io::Result<()> {
    let up = "../".repeat(Path::new(name).components().count() + 1);
    std::os::unix::fs::symlink(format!("{up}blobs/{hash}"), pointer)
}

/// Where links are not everybody's to make, the file itself lies there.
#[cfg(not(unix))]
fn link(blob: &Path, pointer: &Path, _name: &str, _hash: &str) -> io::Result<()> {
    fs::rename(blob, pointer)
}

/// A SHA-1 or a SHA-256.
fn is_hash(text: &str) -> bool {
    [40, 64].contains(&text.len()) && text.bytes().all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c))
}

/// The hash of a file, and which: of the length of `expected`. Large files go by the SHA-256 of their bytes, and small
/// ones as Git names them.
fn hash_like(expected: &str, path: &Path) -> Result<(&'static str, String)> {
    if expected.len() == 64 {
        return Ok(("SHA-256", sha256_of_file(path).into_diagnostic()?));
    }
    let mut file = File::open(path).into_diagnostic()?;
    let mut hasher = Sha1::new_with_prefix(format!("blob {}\0", file.metadata().into_diagnostic()?.len()));
    io::copy(&mut file, &mut hasher).into_diagnostic()?;
    Ok(("Git's SHA-1", hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_of_git_and_of_large_file_storage() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hello");
        fs::write(&path, "hello\n").unwrap();
        let git = "ce013625030ba8dba906f756967f9e9ca394464a"; // echo hello | git hash-object --stdin
        assert_eq!(hash_like(git, &path).unwrap().1, git);
        let large = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"; // echo hello | sha256sum
        assert_eq!(hash_like(large, &path).unwrap().1, large);
        assert!(is_hash(git) && is_hash(large));
        for none in ["", "../../x", "17", &git[1..], &git.to_uppercase()] {
            assert!(!is_hash(none), "{none}");
        }
    }
}
