//! Files of a folder that came from somewhere else: a base, an adapter, a run. What leads out of the folder is refused, and so
//! is what is no file: reading from a pipe would wait for ever, and from a device never end. And files written whole, or not at all.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::Path;

use atomic_write_file::AtomicWriteFile;

/// More than any configuration, template or tokenizer takes.
const MOST_TEXT: u64 = 1 << 28;

/// Opens the file at `path`: in its folder, or by a link in the store of a hub's cache, whose folders hold nothing but such links.
pub fn open(path: &Path) -> io::Result<File> {
    let refuse = |problem: String| Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
    if !fs::metadata(path)?.is_file() {
        return refuse("expected a file, found a folder, a pipe or a device".to_owned());
    }
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let target = fs::canonicalize(path)?;
    if target.starts_with(fs::canonicalize(folder)?) || is_blob(&target) {
        return File::open(target);
    }
    refuse(format!(
        "a link that leads out of its folder, to {}; expected the file itself: put a copy of it there, if you trust it",
        target.display()
    ))
}

/// The bytes of the file at `path`, which is [opened](open) so.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The same of a file of text, which may not be larger than any of those is.
pub fn read_text(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.take(MOST_TEXT + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 <= MOST_TEXT {
        return Ok(bytes);
    }
    let problem = format!("expected a file of text, {MOST_TEXT} bytes at most, found more");
    Err(io::Error::new(io::ErrorKind::InvalidData, problem))
}

/// Writes a file whole, to a temporary name beside it, synced and renamed; then reads it back. What reads back otherwise is an
/// error of the kind [`InvalidData`](io::ErrorKind::InvalidData).
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = AtomicWriteFile::open(path)?;
    file.write_all(bytes)?;
    file.commit()?;
    if holds(path, bytes)? {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "the file reads back different from what was written"))
}

/// Whether the file at `path` holds just these bytes.
fn holds(path: &Path, bytes: &[u8]) -> io::Result<bool> {
    let mut file = BufReader::with_capacity(1 << 20, File::open(path)?);
    let mut rest = bytes;
    loop {
        let found = file.fill_buf()?;
        if found.is_empty() {
            return Ok(rest.is_empty());
        }
        let Some(behind) = rest.strip_prefix(found) else { return Ok(false) };
        rest = behind;
        let length = found.len();
        file.consume(length);
    }
}

/// Whether it is `models--OWNER--NAME/blobs/HASH`, as the hub's library keeps its files.
fn is_blob(target: &Path) -> bool {
    let mut above = target.ancestors().skip(1).map(|folder| folder.file_name().and_then(OsStr::to_str));
    let (blobs, repository) = (above.next().flatten(), above.next().flatten());
    blobs == Some("blobs") && repository.is_some_and(|name| name.starts_with("models--"))
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::symlink;
    use std::process::Command;

    use super::*;

    #[test]
    fn what_leads_out_of_the_folder_or_is_no_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let blobs = at("cache/models--a--b/blobs");
        for folder in [&at("base"), &blobs] {
            fs::create_dir_all(folder).unwrap();
        }
        for file in [at("secret"), at("base/plain"), blobs.join("0a")] {
            fs::write(file, "words").unwrap();
        }
        symlink("plain", at("base/inside")).unwrap();
        symlink(blobs.join("0a"), at("base/blob")).unwrap();
        symlink("../secret", at("base/outside")).unwrap();
        symlink("/dev/zero", at("base/device")).unwrap();
        assert!(Command::new("mkfifo").arg(at("base/pipe")).status().unwrap().success());
        for name in ["base/plain", "base/inside", "base/blob"] {
            assert_eq!(read(&at(name)).unwrap(), b"words", "{name}");
            assert_eq!(read_text(&at(name)).unwrap(), b"words", "{name}");
        }
        for (name, problem) in [
            ("base/outside", "a link that leads out of its folder"),
            ("base/device", "a pipe or a device"),
            ("base/pipe", "a pipe or a device"),
            ("base", "found a folder"),
        ] {
            let error = read(&at(name)).unwrap_err().to_string();
            assert!(error.contains(problem), "{name}: {error}");
        }
        for (bytes, is_it) in [("words", true), ("word", false), ("words.", false), ("", false)] {
            assert_eq!(holds(&at("base/plain"), bytes.as_bytes()).unwrap(), is_it, "{bytes}");
        }
        write(&at("base/plain"), b"other words").unwrap();
        assert_eq!(read(&at("base/plain")).unwrap(), b"other words");
        // As long as it is told to be, and nowhere on the disk.
        File::create(at("base/long")).unwrap().set_len(1 << 40).unwrap();
        assert!(read_text(&at("base/long")).unwrap_err().to_string().contains("268435456 bytes at most"));
    }
}
