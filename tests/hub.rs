//! Data sets of the hub, from a hub of this machine's own.
#![allow(clippy::unwrap_used, clippy::expect_used)] // in a test, a panic is the report

mod support;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::thread;

use sha1::Sha1;
use sha2::{Digest, Sha256};
use support::{Run, Workshop, command, golden};

const SHA: &str = "0123456789abcdef0123456789abcdef01234567";

/// What a hub does to a file on its way.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    Whole,
    /// A byte of it is another.
    Changed,
    /// The connection ends in the middle.
    Cut,
    /// Its name in the cache would lead out of that.
    Astray,
}

/// Serves `files` of the data set, and the model, `pronk/talk` for as long as the test runs; its address.
fn hub(files: BTreeMap<&'static str, Vec<u8>>, way: Way) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = serve(stream.unwrap(), &files, way); // who hung up needs no answer
        }
    });
    address
}

fn serve(mut stream: TcpStream, files: &BTreeMap<&str, Vec<u8>>, way: Way) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let path = lines.next().unwrap_or(Ok(String::new()))?.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut range = None;
    for line in lines {
        let line = line?.to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        range = line.strip_prefix("range: bytes=").map(str::to_owned).or(range);
    }
    let names: Vec<_> = files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
    let about = serde_json::json!({"siblings": names, "sha": SHA}).to_string().into_bytes();
    let revision = |kind| ["main", SHA].map(|revision| format!("/api/{kind}/pronk/talk/revision/{revision}"));
    let revisions = [revision("datasets"), revision("models")].concat();
    let places = ["/datasets/pronk/talk", "/pronk/talk"].map(|at| format!("{at}/resolve/{SHA}/"));
    let file = places.iter().find_map(|place| path.strip_prefix(place));
    let found = if revisions.contains(&path) { Some(&about) } else { file.and_then(|name| files.get(name)) };
    let Some(whole) = found else {
        return stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    };
    let ranged = range.is_some();
    let (start, end) = match range.as_deref().and_then(|range| range.split_once('-')) {
        Some((start, end)) => (start.parse().unwrap(), end.parse().map_or(whole.len(), |end: usize| end + 1)),
        None => (0, whole.len()),
    };
    let mut part = whole[start..end.min(whole.len())].to_vec();
    let (length, asked_for_all) = (part.len(), range.is_none_or(|range| range.ends_with('-')));
    if file.is_some() && asked_for_all {
        match way {
            Way::Changed => part[length / 2] ^= 1,
            Way::Cut => part.truncate(length / 2),
            Way::Whole | Way::Astray => {}
        }
    }
    // Large files go by their SHA-256, small ones as Git names them.
    let etag = match way {
        Way::Astray => "../../../astray".to_owned(),
        _ if whole.len() > 1000 => format!("{:x}", Sha256::digest(whole)),
        _ => format!(
            "{:x}",
            Sha1::new_with_prefix(format!("blob {}\0", whole.len())).chain_update(whole).finalize()
        ),
    };
    write!(
        stream,
        "HTTP/1.1 {}\r\nContent-Length: {}\r\nContent-Range: bytes {start}-{}/{}\r\nETag: \"{etag}\"\r\n\
         X-Repo-Commit: {SHA}\r\nConnection: close\r\n\r\n",
        if ranged { "206 Partial Content" } else { "200 OK" },
        length,
        end - 1,
        whole.len(),
    )?;
    stream.write_all(&part)
}

fn table(name: &str) -> Vec<u8> {
    let tables = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/tests/tables");
    std::fs::read(tables.join(name)).unwrap()
}

fn run(shop: &Workshop, hub: &str, args: &[&str]) -> Run {
    command(shop.root()).env("HF_ENDPOINT", hub).args(args).output().unwrap().into()
}

#[test]
fn a_data_set_is_fetched_by_its_revision_and_kept() {
    let files = BTreeMap::from([
        ("README.md", b"about".to_vec()),
        ("main/train-00000-of-00001.parquet", table("alpaca-zstd.parquet")),
        ("main/test-00000-of-00001.parquet", b"not asked for".to_vec()),
        ("other/train.parquet", b"neither".to_vec()),
    ]);
    let hub = hub(files, Way::Whole);
    let shop = Workshop::new();
    let base = golden("tiny-gqa");
    let prep = |name| ["prep", "--data", name, "--base", &base, "--out", "p", "--template", "alpaca-short"];
    run(&shop, &hub, &prep("pronk/talk")).fails(&["several folders: main, other", "OWNER/NAME/"]);
    run(&shop, &hub, &prep("pronk/nothing")).fails(&["pronk/nothing", "could not be fetched", "404"]);
    let told = run(&shop, &hub, &prep("pronk/talk/main")).succeeds().out;
    assert!(told.contains(&format!("pronk/talk@{SHA}: main/train-00000-of-00001.parquet\n")), "{told}");
    assert!(told.contains("Alpaca, 300 records"), "{told}");

    // A run is of the files that it began with, and needs no network to go on.
    let recipe = support::recipe("tiny-gqa").replace("data.json", &format!("pronk/talk/main@{SHA}"));
    shop.write("recipe.toml", recipe);
    let short = ["--set", "train.max_steps=2", "--set", "data.max_seq_len=128"];
    let train = ["train", "recipe.toml", "--set", "run.dir=run", "--device", "cpu"];
    run(&shop, &hub, &[&train[..], &short].concat()).succeeds();
    assert!(shop.read("run/recipe.toml").contains(&format!("snapshots/{SHA}/main/train-0")));
    let more = ["--set", "train.max_steps=3", "--accept-changes"];
    let resume = ["train", "--resume", "run", "--device", "cpu"];
    shop.pronk(resume.into_iter().chain(more)).succeeds();
}

/// What the hub's cache holds, whatever there is beside it of downloads under way.
fn cached(shop: &Workshop) -> Vec<String> {
    let cache = shop.path(".hub/hub");
    let names = shop.snapshot().into_iter().filter(|(path, bytes)| path.is_file() && !bytes.is_empty());
    let names = names.filter_map(|(path, _)| Some(path.strip_prefix(&cache).ok()?.display().to_string()));
    names.filter(|name| !name.starts_with(".pronk-arrivals")).collect()
}

#[test]
fn what_came_damaged_is_named_and_never_gets_into_the_cache() {
    let files = || {
        BTreeMap::from([
            ("train.json", br#"[{"instruction": "a", "output": "b"}]"#.to_vec()),
            ("README.md", vec![]),
        ])
    };
    let large = || BTreeMap::from([("train.parquet", table("alpaca-zstd.parquet"))]);
    let shop = Workshop::new();
    let base = golden("tiny-gqa");
    let prep = ["prep", "--data", "pronk/talk", "--base", &base, "--out", "p", "--template", "alpaca-short"];
    run(&shop, &hub(files(), Way::Changed), &prep).fails(&[
        "train.json",
        "damaged",
        "Git's SHA-1",
        "try again",
    ]);
    run(&shop, &hub(large(), Way::Changed), &prep).fails(&[
        "train.parquet",
        "damaged",
        "expected SHA-256",
        "found",
    ]);
    run(&shop, &hub(large(), Way::Cut), &prep).fails(&["pronk/talk", "train.parquet"]);
    run(&shop, &hub(large(), Way::Astray), &prep).fails(&[
        "train.parquet",
        "expected a hash",
        "../../../astray",
    ]);
    let outside = BTreeMap::from([("../../train.json", b"[]".to_vec())]);
    run(&shop, &hub(outside, Way::Whole), &prep).fails(&["../../train.json", "leaves"]);
    assert_eq!(cached(&shop), [""; 0]);
    assert!(!shop.path("p").exists());

    // What was half there is gone on with, and is whole then.
    run(&shop, &hub(large(), Way::Whole), &prep).succeeds();
    let sha256 = format!("{:x}", Sha256::digest(table("alpaca-zstd.parquet")));
    let repository = "datasets--pronk--talk";
    assert_eq!(
        cached(&shop),
        [
            format!("{repository}/blobs/{sha256}"),
            format!("{repository}/refs/{SHA}"),
            format!("{repository}/snapshots/{SHA}/train.parquet"),
        ]
    );
}

#[test]
fn a_base_is_fetched_by_its_revision() {
    let base = golden("tiny-gqa");
    let names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    let file = |name: &'static str| Some((name, std::fs::read(Path::new(&base).join(name)).ok()?));
    let hub = hub(names.into_iter().filter_map(file).collect(), Way::Whole);
    let shop = Workshop::new();
    let name = format!("pronk/talk@{SHA}");
    let prep = ["prep", "--data", "data.json", "--base", &name, "--out", "p", "--template", "alpaca-short"];
    let told = run(&shop, &hub, &prep).succeeds().out;
    assert!(told.contains(&format!("pronk/talk@{SHA}")), "{told}");
    let snapshot = shop.path(&format!(".hub/hub/models--pronk--talk/snapshots/{SHA}"));
    assert_eq!(
        std::fs::read(snapshot.join("model.safetensors")).unwrap(),
        file("model.safetensors").unwrap().1
    );
}

#[test]
fn without_a_network_it_is_said() {
    let shop = Workshop::new();
    let base = golden("tiny-gqa");
    let before = shop.snapshot();
    shop.pronk(["prep", "--data", "pronk/talk", "--base", &base, "--out", "p"]).fails(&[
        "pronk/talk: there is no such file, and as a data set of the hub it could not be fetched",
        "Without a network",
    ]);
    let mut after = shop.snapshot();
    after.retain(|path, _| !path.starts_with(shop.path(".hub")));
    assert!(after == before);
}
