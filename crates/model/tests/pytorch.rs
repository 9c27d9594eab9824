//! Checkpoints in PyTorch's own files, whole ones and hostile ones. No pickle is ever executed.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test reports by panicking

use std::fs;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

use pronk_model::Base;
use tempfile::TempDir;
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

const WEIGHTS: &str = "pytorch_model.bin";
const SHARDS: [&str; 2] = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"];
const INDEX: &str = "pytorch_model.bin.index.json";

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

/// A directory with tiny-mistral's configuration and some of PyTorch's files.
fn directory(files: &[&str]) -> TempDir {
    let dir = TempDir::new().unwrap();
    fs::copy(golden("tiny-mistral/config.json"), dir.path().join("config.json")).unwrap();
    for file in files {
        fs::copy(golden("pytorch-mistral").join(file), dir.path().join(file)).unwrap();
    }
    dir
}

fn refusal(dir: &TempDir) -> String {
    let message = Base::open(dir.path()).map(|_| ()).unwrap_err().to_string();
    assert!(message.starts_with(&dir.path().display().to_string()), "{message}");
    message
}

fn assert_tells(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "'{part}' is not in: {message}");
    }
}

#[test]
fn shards_hold_what_safetensors_hold() {
    let dir = directory(&[SHARDS[0], SHARDS[1], INDEX]);
    let [found, expected] = [dir.path(), &golden("tiny-mistral")].map(|path| Base::open(path).unwrap());
    for (name, _) in expected.config.tensors() {
        let [a, b] = [&found, &expected].map(|base| base.read(&name).unwrap());
        assert_eq!((a.dtype, &a.shape, &a.bytes), (b.dtype, &b.shape, &b.bytes), "{name}");
    }
    let [shard] = &found.shards(1 << 30, 4)[..] else { panic!("one shard") };
    assert_eq!(shard.file, "model.safetensors", "what is made of it is safetensors");
}

#[test]
fn safetensors_go_first() {
    let dir = directory(&[SHARDS[0]]);
    fs::copy(golden("tiny-mistral/model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    Base::open(dir.path()).unwrap();
}

#[test]
fn a_shard_cut_short_or_missing() {
    let dir = directory(&[SHARDS[0], SHARDS[1], INDEX]);
    let shard = dir.path().join(SHARDS[0]);
    let whole = fs::read(&shard).unwrap();
    for length in [0, 1, 22, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&shard, &whole[..length]).unwrap();
        assert_tells(&refusal(&dir), &[SHARDS[0], "not a whole PyTorch file", "download it again"]);
    }
    fs::remove_file(&shard).unwrap();
    assert_tells(&refusal(&dir), &[SHARDS[0], "No such file"]);
}

#[test]
fn every_byte_may_lie() {
    let dir = directory(&[SHARDS[0], SHARDS[1], INDEX]);
    let shard = dir.path().join(SHARDS[1]);
    let whole = fs::read(&shard).unwrap();
    let pickle = whole.windows(4).position(|bytes| bytes == [0x80, 2, b'}', b'q']).unwrap();
    for at in (pickle..pickle + 1500).chain(whole.len() - 400..whole.len()).step_by(7) {
        for value in [0xFF, whole[at].wrapping_add(1), b'h'] {
            let mut bytes = whole.clone();
            bytes[at] = value;
            fs::write(&shard, &bytes).unwrap();
            let _ = Base::open(dir.path()); // it opens, or it says why not; it never panics
        }
    }
}

#[test]
fn what_is_no_tensor_of_floats_in_order() {
    for (file, told) in [
        (
            "turned.bin",
            "model.norm.weight: expected rows one after another, found shape [6, 4] with strides [1, 6]",
        ),
        (
            "whole-numbers.bin",
            "model.norm.weight: expected float32, float16 or bfloat16, found torch.LongStorage",
        ),
        ("old.bin", "load and save such a one with a newer PyTorch"),
    ] {
        let dir = directory(&[file]);
        fs::rename(dir.path().join(file), dir.path().join(WEIGHTS)).unwrap();
        assert_tells(&refusal(&dir), &[WEIGHTS, told]);
    }
}

/// An archive with this pickle, and one storage of eight bytes.
fn archive(pickle: &[u8]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in [("archive/data.pkl", pickle), ("archive/data/0", &[0; 8])] {
        zip.start_file(name, options).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn text(s: &str) -> Vec<u8> {
    [b"X", &(s.len() as u32).to_le_bytes()[..], s.as_bytes()].concat()
}

/// A pickle of a dictionary with one entry, `model.norm.weight`.
fn entry(value: &[u8]) -> Vec<u8> {
    [b"\x80\x02}", &text("model.norm.weight")[..], value, b"s."].concat()
}

/// What `_rebuild_tensor_v2` is given: a storage, an offset, a shape and its strides.
fn tensor(storage: &str, key: &str, offset: i32, size: i32) -> Vec<u8> {
    let number = |n: i32| [&b"J"[..], &n.to_le_bytes()].concat();
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n((",
        &text("storage")[..],
        format!("ctorch\n{storage}\n").as_bytes(),
        &text(key),
        &text("cpu"),
        b"K\x02tQ",
        &number(offset),
        &number(size),
        b"\x85K\x01\x85\x89NtR",
    ]
    .concat()
}

#[test]
fn pickles_that_are_no_checkpoint() {
    let dir = directory(&[]);
    let told = |pickle: &[u8]| {
        fs::write(dir.path().join(WEIGHTS), archive(pickle)).unwrap();
        let message = refusal(&dir);
        assert_tells(&message, &[WEIGHTS]);
        message
    };
    let command = [b"cos\nsystem\n", &text("touch owned")[..], b"\x85R"].concat();
    assert_tells(
        &told(&entry(&command)),
        &["model.norm.weight: made by os.system, which is not executed here"],
    );
    assert_tells(&told(&[&command[..], b"."].concat()), &["expected a dictionary of tensors"]);
    assert_tells(&told(&entry(b"K\x07")), &["model.norm.weight: expected a tensor, found Int(7)"]);

    // What each reference doubles, and what goes ever deeper.
    let doubled = [&b")q\x00"[..], &b"h\x00h\x00\x86q\x00".repeat(60)].concat();
    assert_tells(&told(&entry(&doubled)), &["objects within each other"]);
    let deep = [&b")"[..], &b"\x85".repeat(1_000_000)].concat();
    assert_tells(&told(&entry(&deep)), &["objects more than 32 deep"]);
    let deep = [&b"]q\x00"[..], &b"]".repeat(100_000), &b"a".repeat(100_000)].concat();
    assert_tells(&told(&entry(&deep)), &["objects more than 32 deep"]);
    assert_tells(&told(b"\x80\x02X\xff\xff\xff\xff"), &["a text that ends beyond the file"]);
    let number = |length: u8| [&[0x8A, length][..], &vec![1; length.into()]].concat();
    assert_tells(&told(&entry(&number(9))), &["a whole number of more than eight bytes"]);
    assert_tells(&told(&entry(&number(255))), &["a whole number of more than eight bytes"]);
    assert_tells(&told(&entry(&number(8))), &["model.norm.weight: expected a tensor, found Long("]);
    assert_tells(&told(b"\x80\x02}\xfe."), &["unknown op-code"]);
    told(b"");
    told(b"\x80\x02");

    assert_tells(&told(&entry(&tensor("FloatStorage", "7", 0, 2))), &["archive/data/7"]);
    assert_tells(&told(&entry(&tensor("FloatStorage", "../../x", 0, 2))), &["archive/data/../../x"]);
    for (offset, size) in [(0, 3), (1, 2), (i32::MAX, 1), (0, i32::MAX)] {
        let message = told(&entry(&tensor("FloatStorage", "0", offset, size)));
        assert_tells(&message, &["ends beyond the 8 bytes that are stored"]);
    }
    assert_tells(&told(&entry(&tensor("FloatStorage", "0", -1, 2))), &["described in another way"]);
    fs::write(dir.path().join(WEIGHTS), archive(&entry(&tensor("FloatStorage", "0", 0, 2)))).unwrap();
    assert_tells(&refusal(&dir), &["model.norm.weight: expected shape [32], found [2]"]);
    assert!(!dir.path().join("owned").exists());
}

#[test]
fn an_archive_of_something_else() {
    let dir = directory(&[]);
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    zip.start_file(
        "readme.txt",
        SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored),
    )
    .unwrap();
    fs::write(dir.path().join(WEIGHTS), zip.finish().unwrap().into_inner()).unwrap();
    assert_tells(&refusal(&dir), &[WEIGHTS, "there is no data.pkl"]);
}
