//! `pronk push`, to a hub of this machine's own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)] // in a test, a panic is the report

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use pronk_train::sha256_of_file;
use serde_json::{Value, json};
use support::{Run, Workshop, command, golden};

const REPO: &str = "pronk/hum";

/// What a hub knows. It takes the token "writer", lets "reader" look, and knows nobody else.
#[derive(Debug, Default)]
struct Known {
    /// Repositories, and whether they are private.
    repos: BTreeMap<String, bool>,
    branches: BTreeSet<String>,
    /// The store, by hash.
    stored: BTreeMap<String, Vec<u8>>,
    /// Parts of a file that is stored in parts of so many bytes.
    chunk: Option<usize>,
    parts: BTreeMap<usize, Vec<u8>>,
    /// Each with its branch and its lines.
    commits: Vec<(String, Vec<Value>)>,
    requests: Vec<String>,
}

#[derive(Clone)]
struct Hub {
    address: String,
    known: Arc<Mutex<Known>>,
}

impl Hub {
    fn new(known: Known) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let hub = Self { address, known: Arc::new(Mutex::new(known)) };
        let server = hub.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let _ = server.serve(stream.unwrap()); // who hung up needs no answer
            }
        });
        hub
    }

    fn serve(&self, mut stream: TcpStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut first = String::new();
        reader.read_line(&mut first)?;
        let mut headers = BTreeMap::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            match line.trim_end().split_once(": ") {
                Some((name, value)) => headers.insert(name.to_ascii_lowercase(), value.to_owned()),
                None => break,
            };
        }
        let length = headers.get("content-length").map_or(0, |length| length.parse().unwrap());
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let token = headers.get("authorization").map_or("", |token| token.trim_start_matches("Bearer "));
        let (status, answer) = self.answer(first.rsplit_once(' ').unwrap().0, token, &body);
        let answer = answer.to_string();
        write!(
            stream,
            "HTTP/1.1 {status} Told\r\nETag: \"etag-{length}\"\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{answer}",
            answer.len()
        )
    }

    fn answer(&self, request: &str, token: &str, body: &[u8]) -> (u16, Value) {
        let mut known = self.known.lock().unwrap();
        known.requests.push(request.to_owned());
        let (method, path) = request.split_once(' ').unwrap();
        if let ("PUT", Some(oid)) = (method, path.strip_prefix("/store/")) {
            assert_eq!(token, "", "the store gets no token");
            match oid.split_once('/') {
                Some((_, part)) => drop(known.parts.insert(part.parse().unwrap(), body.to_vec())),
                None => drop(known.stored.insert(oid.to_owned(), body.to_vec())),
            }
            return (200, json!({}));
        }
        match token {
            "writer" => {}
            "reader" => return (403, json!({"error": "You don't have the rights"})),
            _ => return (401, json!({"error": "Invalid credentials"})),
        }
        if method == "GET" {
            let private = known.repos.get(path.trim_start_matches("/api/models/"));
            return private.map_or((404, json!({})), |private| (200, json!({"private": private})));
        }
        if let Some(oid) = path.strip_prefix("/complete/") {
            let asked: Value = serde_json::from_slice(body).unwrap();
            let whole: Vec<u8> = std::mem::take(&mut known.parts).into_values().flatten().collect();
            assert_eq!(
                asked["parts"][0],
                json!({"partNumber": 1, "etag": format!("\"etag-{}\"", known.chunk.unwrap())})
            );
            known.stored.insert(oid.to_owned(), whole);
            return (200, json!({}));
        }
        if path == "/api/repos/create" {
            let asked: Value = serde_json::from_slice(body).unwrap();
            assert_eq!(asked["type"], "model");
            let repo =
                format!("{}/{}", asked["organization"].as_str().unwrap(), asked["name"].as_str().unwrap());
            if known.repos.contains_key(&repo) {
                return (409, json!({"error": "You already created this model repo"}));
            }
            known.repos.insert(repo, asked["private"] == true);
            known.branches.insert("main".into());
            return (200, json!({}));
        }
        let Some((what, branch)) =
            path.strip_prefix(&format!("/api/models/{REPO}/")).and_then(|p| p.split_once('/'))
        else {
            assert_eq!(path, format!("/{REPO}.git/info/lfs/objects/batch"));
            return (200, self.batch(&known, &serde_json::from_slice(body).unwrap()));
        };
        match what {
            "branch" if known.branches.contains(branch) => (409, json!({})),
            "branch" => {
                known.branches.insert(branch.to_owned());
                (200, json!({}))
            }
            _ if !known.branches.contains(branch) => (404, json!({"error": "Invalid rev id"})),
            "preupload" => {
                let asked: Value = serde_json::from_slice(body).unwrap();
                let mode = |file: &Value| {
                    let large = file["path"].as_str().unwrap().contains("safetensors");
                    assert!(BASE64.decode(file["sample"].as_str().unwrap()).unwrap().len() <= 512);
                    json!({"path": file["path"], "uploadMode": if large { "lfs" } else { "regular" }, "shouldIgnore": false})
                };
                (
                    200,
                    json!({"files": asked["files"].as_array().unwrap().iter().map(mode).collect::<Vec<_>>()}),
                )
            }
            "commit" => {
                let lines = std::str::from_utf8(body).unwrap().lines();
                let lines = lines.map(|line| serde_json::from_str(line).unwrap()).collect();
                known.commits.push((branch.to_owned(), lines));
                (200, json!({"commitUrl": format!("{}/{REPO}/commit/1", self.address)}))
            }
            other => panic!("{other}"),
        }
    }

    /// Where the store wants a file that it does not have.
    fn batch(&self, known: &Known, asked: &Value) -> Value {
        let object = &asked["objects"][0];
        let (oid, size) = (object["oid"].as_str().unwrap(), object["size"].as_u64().unwrap() as usize);
        if known.stored.contains_key(oid) {
            return json!({"objects": [{"oid": oid, "size": size}]});
        }
        let upload = match known.chunk {
            None => json!({"href": format!("{}/store/{oid}", self.address)}),
            Some(chunk) => {
                let part = |n| (format!("{n:05}"), format!("{}/store/{oid}/{n}", self.address).into());
                let mut header: serde_json::Map<String, Value> =
                    (1..=size.div_ceil(chunk)).map(part).collect();
                header.insert("chunk_size".into(), chunk.to_string().into());
                json!({"href": format!("{}/complete/{oid}", self.address), "header": header})
            }
        };
        json!({"objects": [{"oid": oid, "size": size, "actions": {"upload": upload}}]})
    }

    /// What it was asked since the last time.
    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.known.lock().unwrap().requests)
    }

    fn push(&self, shop: &Workshop, dir: &str, token: &str, more: &[&str]) -> Run {
        let args = ["push", dir, "--repo", REPO];
        let mut command = command(shop.root());
        command.env("HF_ENDPOINT", &self.address).env("HF_TOKEN", token);
        command.args(args.iter().chain(more)).output().unwrap().into()
    }

    /// The files of the last commit, as they are in the repository afterwards.
    fn committed(&self) -> BTreeMap<String, Vec<u8>> {
        let known = self.known.lock().unwrap();
        let (_, lines) = known.commits.last().unwrap();
        assert_eq!(lines[0]["key"], "header");
        let file = |line: &Value| {
            let value = &line["value"];
            let bytes = match line["key"].as_str().unwrap() {
                "file" => BASE64.decode(value["content"].as_str().unwrap()).unwrap(),
                "lfsFile" => known.stored[value["oid"].as_str().unwrap()].clone(),
                other => panic!("{other}"),
            };
            (value["path"].as_str().unwrap().to_owned(), bytes)
        };
        lines[1..].iter().map(file).collect()
    }
}

/// An adapter for PEFT, as `pronk export` writes it.
fn adapter(shop: &Workshop) -> &'static str {
    let (base, adapter) = (golden("tiny-gqa"), golden("adapter-gqa"));
    shop.pronk(["export", "--base", &base, "--adapter", &adapter, "--to", "peft", "--out", "out"]).succeeds();
    "out"
}

fn files_of(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let file = |path: std::path::PathBuf| {
        (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(path).unwrap())
    };
    files.map(file).filter(|(name, _)| name != "manifest.json").collect()
}

#[test]
fn nothing_is_sent_without_a_yes() {
    let (shop, hub) = (Workshop::new(), Hub::new(Known::default()));
    let dir = adapter(&shop);
    let run = hub.push(&shop, dir, "", &[]).fails(&["nothing was sent", "--yes"]);
    for word in [
        "would send 3 files",
        hub.address.as_str(),
        "pronk/hum, branch main",
        "adapter_model.safetensors",
        "README.md",
    ] {
        assert!(run.out.contains(word), "{word}: {}", run.out);
    }
    assert!(!run.out.contains("manifest.json"));
    assert_eq!(hub.requests(), [""; 0]);
}

#[test]
fn one_commit_holds_all_and_what_is_stored_is_not_sent_again() {
    let (shop, hub) = (Workshop::new(), Hub::new(Known::default()));
    let dir = adapter(&shop);
    let run = hub.push(&shop, dir, "writer", &["--yes", "--private"]).succeeds();
    assert!(run.out.contains(&format!("sent: {}/pronk/hum/commit/1", hub.address)), "{}", run.out);
    assert_eq!(hub.committed(), files_of(&shop.path(dir)));
    let oid = sha256_of_file(&shop.path("out/adapter_model.safetensors")).unwrap();
    let batch = "POST /pronk/hum.git/info/lfs/objects/batch".to_owned();
    let [create, preupload, commit] =
        ["repos/create", "models/pronk/hum/preupload/main", "models/pronk/hum/commit/main"]
            .map(|p| format!("POST /api/{p}"));
    let put = format!("PUT /store/{oid}");
    assert_eq!(hub.requests(), [create.clone(), preupload.clone(), batch.clone(), put, commit.clone()]);
    assert_eq!(hub.known.lock().unwrap().repos, BTreeMap::from([(REPO.to_owned(), true)]));

    // The card is its owner's to write on.
    shop.write("out/README.md", "# Mine\n");
    hub.push(&shop, dir, "writer", &["--yes", "--message", "A card"]).succeeds();
    assert_eq!(hub.requests(), [create, preupload, batch, commit]);
    assert_eq!(hub.committed(), files_of(&shop.path(dir)));
    assert_eq!(hub.known.lock().unwrap().commits[1].1[0]["value"]["summary"], "A card");
}

#[test]
fn large_files_go_in_parts_and_branches_are_made() {
    let (shop, hub) = (Workshop::new(), Hub::new(Known { chunk: Some(8_000), ..Known::default() }));
    let dir = adapter(&shop);
    let bytes = shop.bytes("out/adapter_model.safetensors").len();
    assert!(bytes > 16_000 && bytes % 8_000 != 0, "{bytes}: not in several parts, the last one short");
    hub.push(&shop, dir, "writer", &["--yes", "--revision", "drafts/1"]).succeeds();
    assert_eq!(hub.committed(), files_of(&shop.path(dir)));
    assert_eq!(hub.known.lock().unwrap().commits[0].0, "drafts%2F1");
    let parts = hub.requests().into_iter().filter(|request| request.starts_with("PUT")).count();
    assert_eq!(parts, bytes.div_ceil(8_000));
}

#[test]
fn what_the_hub_refuses_is_told_and_commits_nothing() {
    let known = Known { repos: BTreeMap::from([(REPO.to_owned(), false)]), ..Known::default() };
    let (shop, hub) = (Workshop::new(), Hub::new(known));
    let dir = adapter(&shop);
    hub.push(&shop, dir, "nobody", &["--yes"]).fails(&[
        "does not know the token",
        "401",
        "Invalid credentials",
    ]);
    hub.push(&shop, dir, "reader", &["--yes"]).fails(&["may not write to pronk/hum", "403", "as it was"]);
    hub.push(&shop, dir, "writer", &["--yes"]).fails(&[
        "no pronk/hum with a branch main",
        "404",
        "Invalid rev id",
    ]);
    hub.push(&shop, dir, "writer", &["--yes", "--private"])
        .fails(&["--private", "there already, and public"]);
    assert!(hub.known.lock().unwrap().commits.is_empty());
    hub.requests();
    hub.push(&shop, dir, "", &["--yes"]).fails(&["expected a token", "HF_TOKEN", "hf auth login"]);
    hub.push(&shop, dir, "writer", &["--yes", "--revision", ""]).fails(&["--revision"]);
    assert_eq!(hub.requests(), [""; 0]);
    // Where nobody listens.
    let gone = Hub { address: "http://127.0.0.1:9".into(), known: Arc::default() };
    gone.push(&shop, dir, "writer", &["--yes"])
        .fails(&["127.0.0.1:9 cannot be reached", "without a network"]);
}

#[test]
fn the_token_that_hf_keeps_is_found() {
    let (shop, hub) = (Workshop::new(), Hub::new(Known::default()));
    let dir = adapter(&shop);
    shop.write(".hub/token", "writer\n");
    hub.push(&shop, dir, "", &["--yes"]).succeeds();
    assert_eq!(hub.committed(), files_of(&shop.path(dir)));
}

#[test]
fn what_is_not_as_it_was_written_is_not_sent() {
    let (shop, hub) = (Workshop::new(), Hub::new(Known::default()));
    let dir = adapter(&shop);
    let mut weights = shop.bytes("out/adapter_model.safetensors");
    *weights.last_mut().unwrap() ^= 1;
    shop.write("out/adapter_model.safetensors", weights);
    hub.push(&shop, dir, "writer", &["--yes"]).fails(&[
        "not what was written",
        "adapter_model.safetensors",
        "sha256",
    ]);
    fs::remove_file(shop.path("out/manifest.json")).unwrap();
    hub.push(&shop, dir, "writer", &["--yes"]).fails(&["out"]);
    hub.push(&shop, "nowhere", "writer", &["--yes"]).fails(&["nowhere"]);
    shop.train("run", "cpu", &["train.max_steps=2", "train.eval_steps=2"]).succeeds();
    hub.push(&shop, "run", "writer", &["--yes"]).fails(&["run's folder", "run/adapter"]);
    let elsewhere = |repo| shop.pronk(["push", "run/adapter", "--repo", repo, "--yes"]);
    elsewhere("hum").fails(&["--repo", "OWNER/NAME", "'hum'"]);
    assert_eq!(hub.requests(), [""; 0]);
    hub.push(&shop, "run/adapter", "writer", &["--yes"]).succeeds();
}

#[test]
fn merged_models_are_whole_folders_too() {
    let (shop, hub) = (Workshop::new(), Hub::new(Known::default()));
    let (base, adapter) = (golden("tiny-gqa"), golden("adapter-gqa"));
    shop.pronk(["merge", "--base", &base, "--adapter", &adapter, "--out", "merged"]).succeeds();
    shop.pronk(["verify", "merged"]).succeeds();
    hub.push(&shop, "merged", "writer", &["--yes"]).succeeds();
    assert_eq!(hub.committed(), files_of(&shop.path("merged")));
    assert!(hub.committed().contains_key("model.safetensors"));
}
