//! Data sets of the hub, from a hub of this machine's own.
#![allow(clippy::unwrap_used, clippy::expect_used)] // in a test, a panic is the report

mod support;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::thread;

use support::{Run, Workshop, command, golden};

const SHA: &str = "0123456789abcdef0123456789abcdef01234567";

/// Serves `files` of the data set `pronk/talk` for as long as the test runs; its address.
fn hub(files: BTreeMap<&'static str, Vec<u8>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = serve(stream.unwrap(), &files); // who hung up needs no answer
        }
    });
    address
}

fn serve(mut stream: TcpStream, files: &BTreeMap<&str, Vec<u8>>) -> std::io::Result<()> {
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
    let revisions = ["main", SHA].map(|revision| format!("/api/datasets/pronk/talk/revision/{revision}"));
    let file = path.strip_prefix(&format!("/datasets/pronk/talk/resolve/{SHA}/"));
    let found = if revisions.contains(&path) { Some(&about) } else { file.and_then(|name| files.get(name)) };
    let Some(whole) = found else {
        return stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    };
    let (start, end) = match range.as_deref().and_then(|range| range.split_once('-')) {
        Some((start, end)) => (start.parse().unwrap(), end.parse().map_or(whole.len(), |end: usize| end + 1)),
        None => (0, whole.len()),
    };
    let part = &whole[start..end.min(whole.len())];
    write!(
        stream,
        "HTTP/1.1 {}\r\nContent-Length: {}\r\nContent-Range: bytes {start}-{}/{}\r\nETag: \"{}\"\r\n\
         X-Repo-Commit: {SHA}\r\nConnection: close\r\n\r\n",
        if range.is_some() { "206 Partial Content" } else { "200 OK" },
        part.len(),
        end - 1,
        whole.len(),
        whole.len(),
    )?;
    stream.write_all(part)
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
    let hub = hub(files);
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
