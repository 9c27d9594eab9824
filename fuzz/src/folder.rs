//! Several files in one input: each behind a line `>>> NAME`, as text that a person can write.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

const MARK: &[u8] = b">>> ";

/// A folder that is gone when it is dropped.
pub struct Folder(TempDir);

impl Folder {
    /// An empty one, in memory where the system has such a place.
    pub fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        Self(made.expect("a folder for temporary files"))
    }

    /// One with the files of `input` that are called as one of `names`.
    pub fn of(input: &[u8], names: &[&str]) -> Self {
        let folder = Self::new();
        for (name, content) in files(input) {
            if names.contains(&name) {
                folder.write(name, content);
            }
        }
        folder
    }

    pub fn write(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path().join(name);
        fs::write(&path, content).expect("room for an input");
        path
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

/// Names and contents; what stands before the first mark is no file's.
fn files(input: &[u8]) -> Vec<(&str, &[u8])> {
    let is_mark = |&at: &usize| input[at..].starts_with(MARK) && (at == 0 || input[at - 1] == b'\n');
    let mut marks: Vec<usize> = (0..input.len()).filter(is_mark).collect();
    marks.push(input.len());
    let file = |pair: &[usize]| {
        let piece = &input[pair[0] + MARK.len()..pair[1]];
        let end = piece.iter().position(|&byte| byte == b'\n')?;
        let content = &piece[end + 1..];
        // The line of the next mark begins behind a line's end that is no part of this file.
        let content =
            if pair[1] < input.len() { content.strip_suffix(b"\n").unwrap_or(content) } else { content };
        Some((std::str::from_utf8(&piece[..end]).ok()?, content))
    };
    marks.windows(2).filter_map(file).collect()
}
