//! Data sets of the hub as data files: `owner/name`, perhaps with a folder of it and a revision.

use std::path::{Path, PathBuf};

use hf_hub::RepoType;
use miette::{Result, WrapErr, miette};
use pronk_data::DataFile;

use crate::hub::Pinned;
use crate::terminal::print;

/// What data files end in, those first that are the same data in less space.
const KINDS: [&[&str]; 3] = [
    &[".parquet"],
    &[".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst"],
    &[".csv", ".arrow"],
];

/// Files about a data set that hold none of it.
const ABOUT: [&str; 3] = ["dataset_infos.json", "dataset_info.json", "state.json"];

/// What files of other splits are called.
const HELD_BACK: [&str; 6] = ["test", "validation", "valid", "val", "dev", "eval"];

/// A data set's name, taken apart.
#[derive(Debug, PartialEq, Eq)]
struct Name<'a> {
    id: String,
    /// Empty, or with a slash at its end.
    folder: String,
    revision: Option<&'a str>,
}

impl<'a> Name<'a> {
    /// Nothing where it is rather a file's.
    fn parse(name: &'a str) -> Option<Self> {
        let (path, revision) = match name.rsplit_once('@') {
            Some((path, revision)) => (path, Some(revision)),
            None => (name, None),
        };
        let is_word = |part: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && !part.starts_with('.') && part.chars().all(plain)
        };
        let mut parts = path.split('/');
        let id = format!("{}/{}", parts.next()?, parts.next()?);
        let folder: String = parts.map(|part| format!("{part}/")).collect();
        let is_file = KINDS.iter().flat_map(|kind| kind.iter()).any(|end| path.ends_with(end));
        (path.split('/').all(is_word) && !is_file).then_some(Self { id, folder, revision })
    }
}

/// Whether `path`, which is no file, may be a data set's name.
pub fn is_name(path: &Path) -> bool {
    path.to_str().is_some_and(|name| Name::parse(name).is_some())
}

/// Data sets of the hub among `files` give way to their files, in the hub's cache.
pub fn fetch(files: Vec<DataFile>) -> Result<Vec<DataFile>> {
    let mut found = Vec::new();
    for file in files {
        let name = file.path.to_str().and_then(Name::parse).filter(|_| !file.path.exists());
        match name {
            None => found.push(file),
            Some(name) => {
                let weight = file.weight;
                let paths = download(&name).wrap_err_with(|| {
                    format!(
                        "{}: there is no such file, and as a data set of the hub it could not be fetched. Without a \
                         network, give the path of a downloaded file; a gated data set needs its conditions accepted \
                         and HF_TOKEN set",
                        file.path.display()
                    )
                })?;
                found.extend(paths.into_iter().map(|path| DataFile { path, weight }));
            }
        }
    }
    Ok(found)
}

/// The files of the train split, all of one revision; those that are in the cache already stay.
fn download(name: &Name) -> Result<Vec<PathBuf>> {
    let Name { id, folder, revision } = name;
    let pinned = Pinned::find(id, RepoType::Dataset, *revision)?;
    let names: Vec<&str> = pinned.files.iter().map(String::as_str).collect();
    let wanted = train_split(&names, folder).map_err(|wrong| miette!("{id}: {wrong}"))?;
    let paths = wanted.iter().map(|name| pinned.get(name)).collect::<Result<Vec<_>>>()?;
    print(&format!("data      {id}@{}: {}\n", pinned.sha, wanted.join(", ")));
    Ok(paths)
}

/// Of a data set's files, those below `folder` that are the train split.
fn train_split<'a>(names: &[&'a str], folder: &str) -> Result<Vec<&'a str>, String> {
    let below = names.iter().copied().filter(|name| name.starts_with(folder));
    let is_data = |name: &str, kind: &[&str]| {
        kind.iter().any(|end| name.ends_with(end)) && !ABOUT.iter().any(|about| name.ends_with(about))
    };
    let of_kind = |kind: &[&str]| below.clone().filter(|name| is_data(name, kind)).collect::<Vec<_>>();
    let data = KINDS.iter().map(|kind| of_kind(kind)).find(|data| !data.is_empty());
    let data = data.ok_or("no Parquet, JSON, CSV or Arrow file among its files")?;
    let says = |name: &str, words: &[&str]| {
        let name = name.get(folder.len()..).unwrap_or_default().to_ascii_lowercase();
        name.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| words.contains(&word))
    };
    let mut split: Vec<&str> = data.iter().copied().filter(|name| says(name, &["train"])).collect();
    if split.is_empty() {
        split = data.iter().copied().filter(|name| !says(name, &HELD_BACK)).collect();
    }
    split.sort_unstable();
    let mut folders: Vec<&str> =
        split.iter().map(|name| name.rsplit_once('/').map_or("", |parts| parts.0)).collect();
    folders.dedup();
    match folders.as_slice() {
        [] => Err(format!("no train split among {}", data.join(", "))),
        [_] => Ok(split),
        several => Err(format!(
            "its train split is in several folders: {}; expected one, such as OWNER/NAME/{}",
            several.join(", "),
            several.last().copied().unwrap_or_default()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_files() {
        let parse = |name| Name::parse(name).map(|name| (name.id, name.folder, name.revision));
        let plain = |id: &str, folder: &str, revision| Some((id.to_owned(), folder.to_owned(), revision));
        assert_eq!(parse("tatsu-lab/alpaca"), plain("tatsu-lab/alpaca", "", None));
        assert_eq!(parse("openai/gsm8k/main@e53f048"), plain("openai/gsm8k", "main/", Some("e53f048")));
        for name in ["alpaca", "data/my.json", "./a/b", "../a", "/a/b", "a b/c", "a/b.parquet", "", "a//b"] {
            assert_eq!(parse(name), None, "{name}");
        }
    }

    #[test]
    fn the_train_split_is_found() {
        let split = |names: &[&'static str]| train_split(names, "");
        let parquet =
            ["README.md", "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "x.json"];
        assert_eq!(split(&parquet).unwrap(), ["data/train-00000-of-00001.parquet"]);
        assert_eq!(split(&["alpaca_data.json", "dataset_infos.json"]).unwrap(), ["alpaca_data.json"]);
        assert_eq!(split(&["b_dev.jsonl", "b.jsonl"]).unwrap(), ["b.jsonl"]);
        assert_eq!(split(&["train_b.jsonl", "train_a.jsonl"]).unwrap(), ["train_a.jsonl", "train_b.jsonl"]);
        let two = ["main/train-0.parquet", "main/test-0.parquet", "socratic/train-0.parquet"];
        let error = split(&two).unwrap_err();
        assert!(
            error.contains("several folders: main, socratic") && error.contains("OWNER/NAME/socratic"),
            "{error}"
        );
        assert_eq!(train_split(&two, "main/").unwrap(), ["main/train-0.parquet"]);
        assert!(split(&["README.md"]).unwrap_err().contains("no Parquet"));
        assert!(split(&["test.json"]).unwrap_err().contains("no train split among test.json"));
    }
}
