//! Sending files to a model repository of the Hugging Face hub, as its HTTP API wants it: `hf-hub` 0.5 only fetches.
//!
//! What is large goes to the hub's store first, by the protocol of Git LFS; one commit then names it all. Until that
//! commit nothing of the repository has changed.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use hf_hub::Cache;
use miette::{IntoDiagnostic, Report, Result, WrapErr, miette};
use pronk_train::sha256_of_file;
use serde_json::{Value, json};
use ureq::http::{Response, header};
use ureq::{Agent, Body, RequestBuilder, SendBody, typestate::WithBody};

use crate::progress;

/// How much of a file the hub sees to tell how it wants the whole.
const SAMPLE_BYTES: u64 = 512;
const LFS_JSON: &str = "application/vnd.git-lfs+json";
/// The store fails now and then; a part that was refused so often stays refused.
const TRIES: usize = 3;
/// The branch that every repository has.
pub const MAIN: &str = "main";

/// The hub, and who asks it.
pub struct Hub {
    agent: Agent,
    endpoint: String,
    token: String,
}

/// Where files go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    /// `OWNER/NAME`
    pub repo: String,
    /// A branch.
    pub revision: String,
    /// Whether nobody else may see the repository.
    pub private: bool,
}

/// A file to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileToSend {
    pub path: PathBuf,
    /// Its name in the repository.
    pub name: String,
    pub bytes: u64,
}

/// The hub's address.
pub fn endpoint() -> String {
    let set = std::env::var("HF_ENDPOINT").ok().filter(|set| !set.is_empty());
    set.map_or("https://huggingface.co".into(), |set| set.trim_end_matches('/').to_owned())
}

impl Hub {
    /// With the token of `HF_TOKEN`, or the one that `hf auth login` has kept.
    pub fn from_env() -> Result<Self> {
        let token =
            std::env::var("HF_TOKEN").ok().map(|token| token.trim().to_owned()).filter(|t| !t.is_empty());
        let token = token.or_else(|| Cache::from_env().token()).ok_or_else(|| {
            miette!(
                "expected a token of the hub with write access: set HF_TOKEN, or log in by `hf auth login`"
            )
        })?;
        let timeout = Some(Duration::from_secs(30));
        let config = Agent::config_builder().http_status_as_error(false).timeout_connect(timeout);
        Ok(Self { agent: config.build().into(), endpoint: endpoint(), token })
    }

    /// Sends `files` as one commit, to a repository that is made where there is none. The address of the commit.
    pub fn send(&self, files: &[FileToSend], to: &Destination, summary: &str) -> Result<String> {
        self.make(to)?;
        let modes = self.modes(files, to)?;
        let mut lines = vec![json!({"key": "header", "value": {"summary": summary, "description": ""}})];
        for (file, mode) in files.iter().zip(modes) {
            let content = match mode {
                Mode::Ignored => continue,
                Mode::Large => self.store(file, to).wrap_err_with(|| file.name.clone())?,
                Mode::Regular => {
                    let bytes = fs::read(&file.path).into_diagnostic().wrap_err_with(|| file.name.clone())?;
                    json!({"key": "file", "value":
                        {"path": file.name, "encoding": "base64", "content": BASE64.encode(bytes)}})
                }
            };
            lines.push(content);
        }
        let body: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let url = format!("{}/api/models/{}/commit/{}", self.endpoint, to.repo, escaped(&to.revision));
        let request = self.post(&url).header(header::CONTENT_TYPE, "application/x-ndjson");
        let answer = json_of(self.accepted(request.send(body), to, &[])?)?;
        Ok(answer["commitUrl"].as_str().unwrap_or(&format!("{}/{}", self.endpoint, to.repo)).to_owned())
    }

    /// Makes the repository and the branch, where they are not there yet.
    fn make(&self, to: &Destination) -> Result<()> {
        let (owner, name) = to.repo.split_once('/').unwrap_or_default();
        let asked = json!({"type": "model", "organization": owner, "name": name, "private": to.private});
        let url = format!("{}/api/repos/create", self.endpoint);
        let made = self.accepted(self.post(&url).send_json(asked), to, &[409])?;
        if made.status() == 409 && to.private {
            self.must_be_private(to)?;
        }
        if to.revision != MAIN {
            let url = format!("{}/api/models/{}/branch/{}", self.endpoint, to.repo, escaped(&to.revision));
            self.accepted(self.post(&url).send_json(json!({})), to, &[409])?;
        }
        Ok(())
    }

    /// A repository that was there before is as visible as it was.
    fn must_be_private(&self, to: &Destination) -> Result<()> {
        let url = format!("{}/api/models/{}", self.endpoint, to.repo);
        let request = self.agent.get(&url).header(header::AUTHORIZATION, self.bearer());
        let about = json_of(self.accepted(request.call(), to, &[])?)?;
        if about["private"] == true {
            return Ok(());
        }
        Err(miette!(
            "--private: {} is there already, and public; make it private at {}/{}/settings, or choose another name",
            to.repo,
            self.endpoint,
            to.repo
        ))
    }

    /// How the hub wants each file.
    fn modes(&self, files: &[FileToSend], to: &Destination) -> Result<Vec<Mode>> {
        let about = files.iter().map(|file| {
            let mut sample = Vec::new();
            let beginning =
                File::open(&file.path).and_then(|f| f.take(SAMPLE_BYTES).read_to_end(&mut sample));
            beginning.into_diagnostic().wrap_err_with(|| file.path.display().to_string())?;
            Ok(json!({"path": file.name, "size": file.bytes, "sample": BASE64.encode(sample)}))
        });
        let asked = json!({"files": about.collect::<Result<Vec<Value>>>()?});
        let url = format!("{}/api/models/{}/preupload/{}", self.endpoint, to.repo, escaped(&to.revision));
        let answer = json_of(self.accepted(self.post(&url).send_json(asked), to, &[])?)?;
        let wanted = answer["files"].as_array().cloned().unwrap_or_default();
        let mode = |file: &FileToSend| {
            let found = wanted.iter().find(|wanted| wanted["path"] == file.name);
            match found.map(|wanted| (wanted["shouldIgnore"] == true, wanted["uploadMode"].as_str())) {
                Some((true, _)) => Ok(Mode::Ignored),
                Some((false, Some("regular"))) => Ok(Mode::Regular),
                // The store takes no empty files.
                Some((false, Some("lfs"))) => Ok(if file.bytes == 0 { Mode::Regular } else { Mode::Large }),
                _ => Err(unexpected(&format!("how to send {}", file.name), &answer)),
            }
        };
        files.iter().map(mode).collect()
    }

    /// Puts a file into the hub's store, unless it is there; the line of the commit that names it.
    fn store(&self, file: &FileToSend, to: &Destination) -> Result<Value> {
        let oid = sha256_of_file(&file.path).into_diagnostic()?;
        let object = json!({"oid": oid, "size": file.bytes});
        let asked = json!({
            "operation": "upload", "transfers": ["basic", "multipart"], "hash_algo": "sha256",
            "ref": {"name": to.revision}, "objects": [object],
        });
        let url = format!("{}/{}.git/info/lfs/objects/batch", self.endpoint, to.repo);
        let request = self.post(&url).header(header::ACCEPT, LFS_JSON);
        let answer = json_of(self.accepted(request.send_json(asked), to, &[])?)?;
        let found = &answer["objects"][0];
        if let Some(problem) = found["error"]["message"].as_str() {
            return Err(miette!("the hub's store refuses it: {problem}"));
        }
        let upload = &found["actions"]["upload"];
        if let Some(href) = upload["href"].as_str() {
            match upload["header"]["chunk_size"].as_str().and_then(|size| size.parse().ok()) {
                Some(chunk) => self.put_parts(file, &oid, href, &upload["header"], chunk, to)?,
                None => drop(self.put(file, href, 0, file.bytes)?),
            }
        } else if !found["actions"].is_null() {
            return Err(unexpected("where to put it", &answer));
        }
        if let Some(href) = found["actions"]["verify"]["href"].as_str() {
            self.accepted(self.post(href).send_json(&object), to, &[])?;
        }
        Ok(json!({"key": "lfsFile", "value":
            {"path": file.name, "algo": "sha256", "oid": oid, "size": file.bytes}}))
    }

    /// A file in parts of `chunk` bytes, each to an address of its own, and the word that all are there.
    fn put_parts(
        &self,
        file: &FileToSend,
        oid: &str,
        href: &str,
        addresses: &Value,
        chunk: u64,
        to: &Destination,
    ) -> Result<()> {
        let count = file.bytes.div_ceil(chunk.max(1));
        let mut parts = Vec::new();
        for number in 1..=count {
            // "00001" and the like.
            let address = addresses.as_object().into_iter().flatten();
            let address =
                address.filter(|(key, _)| key.parse::<u64>() == Ok(number)).find_map(|(_, url)| url.as_str());
            let address =
                address.ok_or_else(|| unexpected(&format!("an address for part {number}"), addresses))?;
            let start = (number - 1) * chunk;
            let answer = self.put(file, address, start, chunk.min(file.bytes - start))?;
            let etag = answer.headers().get(header::ETAG).and_then(|etag| etag.to_str().ok());
            let etag = etag.ok_or_else(|| miette!("the hub's store did not confirm part {number}"))?;
            parts.push(json!({"partNumber": number, "etag": etag}));
        }
        let request = self.post(href).header(header::ACCEPT, LFS_JSON);
        self.accepted(request.send_json(json!({"oid": oid, "parts": parts})), to, &[]).map(drop)
    }

    /// Puts so many bytes of a file where the store wants them. The address is signed, and gets no token.
    fn put(&self, file: &FileToSend, url: &str, start: u64, bytes: u64) -> Result<Response<Body>> {
        let mut tries = 1;
        loop {
            let bar = progress::bar("sending bytes", usize::try_from(bytes).unwrap_or(usize::MAX));
            let mut source = File::open(&file.path).into_diagnostic()?;
            source.seek(SeekFrom::Start(start)).into_diagnostic()?;
            let mut source = bar.wrap_read(source.take(bytes));
            let request = self.agent.put(url).header(header::CONTENT_LENGTH, bytes.to_string());
            let answer = request.send(SendBody::from_reader(&mut source));
            bar.finish_and_clear();
            match answer {
                Ok(answer) if answer.status().is_success() => return Ok(answer),
                Ok(answer) if answer.status().is_client_error() || tries == TRIES => {
                    let status = answer.status();
                    return Err(miette!(
                        "the hub's store refused it ({status}); the repository is as it was"
                    ));
                }
                Err(e) if tries == TRIES => return Err(self.unreachable(&e)),
                _ => tries += 1,
            }
        }
    }

    fn post(&self, url: &str) -> RequestBuilder<WithBody> {
        self.agent.post(url).header(header::AUTHORIZATION, self.bearer())
    }

    fn bearer(&self) -> String {
        format!("Bearer {}", self.token)
    }

    /// An answer that says yes, or has a status among `also`; else what to do.
    fn accepted(
        &self,
        answer: Result<Response<Body>, ureq::Error>,
        to: &Destination,
        also: &[u16],
    ) -> Result<Response<Body>> {
        let mut answer = answer.map_err(|e| self.unreachable(&e))?;
        let status = answer.status().as_u16();
        if answer.status().is_success() || also.contains(&status) {
            return Ok(answer);
        }
        let body = answer.body_mut().read_to_string().unwrap_or_default();
        let said = serde_json::from_str::<Value>(&body).ok();
        let said = said.as_ref().and_then(|said| said["error"].as_str()).unwrap_or(&body);
        let Destination { repo, revision, .. } = to;
        let owner = repo.split('/').next().unwrap_or_default();
        let advice = match status {
            401 => format!(
                "the hub does not know the token; make one with write access at {}/settings/tokens, and set HF_TOKEN",
                self.endpoint
            ),
            403 => format!(
                "the token may not write to {repo}: it needs write access, and {owner} has to be you, or \
                 an organization that lets you"
            ),
            404 => format!("there is no {repo} with a branch {revision} that this token may see"),
            _ => "the hub does not take it".to_owned(),
        };
        Err(miette!("{advice} (HTTP {status}: {}); {repo} is as it was", said.trim()))
    }

    fn unreachable(&self, problem: &ureq::Error) -> Report {
        miette!("{} cannot be reached: {problem}; without a network nothing can be sent", self.endpoint)
    }
}

/// How the hub wants a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Within the commit.
    Regular,
    /// In the store, named by the commit.
    Large,
    /// Not at all, says the repository's `.gitignore`.
    Ignored,
}

impl Destination {
    /// Refuses names that the hub would not take.
    pub fn new(repo: &str, revision: &str, private: bool) -> Result<Self> {
        let is_word = |part: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && part.len() <= 96 && !part.starts_with(['.', '-']) && part.chars().all(plain)
        };
        if !repo.split_once('/').is_some_and(|(owner, name)| is_word(owner) && is_word(name)) {
            return Err(miette!(
                "--repo: expected OWNER/NAME of letters, digits, '-', '_' and '.', found '{repo}'"
            ));
        }
        if revision.is_empty() || revision.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(miette!("--revision: expected the name of a branch, found '{revision}'"));
        }
        Ok(Self { repo: repo.into(), revision: revision.into(), private })
    }
}

/// Every plain file in `dir` that is not hidden, by name; the names of folders in it, which stay.
pub fn files_in(dir: &Path) -> Result<(Vec<FileToSend>, Vec<String>)> {
    let (mut files, mut folders) = (Vec::new(), Vec::new());
    let entries = fs::read_dir(dir).into_diagnostic().wrap_err_with(|| dir.display().to_string())?;
    for entry in entries {
        let path = entry.into_diagnostic()?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let about = fs::metadata(&path).into_diagnostic().wrap_err_with(|| path.display().to_string())?;
        if name.starts_with('.') {
            continue;
        }
        if about.is_dir() {
            folders.push(name);
        } else {
            // What a link leads to elsewhere is nobody's to send.
            pronk_files::open(&path).into_diagnostic().wrap_err_with(|| path.display().to_string())?;
            files.push(FileToSend { path, name, bytes: about.len() });
        }
    }
    files.sort_by(|x, y| x.name.cmp(&y.name));
    folders.sort();
    Ok((files, folders))
}

fn json_of(mut answer: Response<Body>) -> Result<Value> {
    answer.body_mut().read_json().into_diagnostic().wrap_err("the hub's answer")
}

fn unexpected(wanted: &str, found: &Value) -> Report {
    miette!("the hub's answer: expected {wanted}, found {found}")
}

/// A branch's name within an address.
fn escaped(revision: &str) -> String {
    let byte = |b: u8| match b {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => char::from(b).to_string(),
        other => format!("%{other:02X}"),
    };
    revision.bytes().map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_the_hub_would_not_take_are_refused() {
        assert!(Destination::new("pronk/hum-1.0_b", MAIN, false).is_ok());
        for repo in ["hum", "a/b/c", "/hum", "pronk/", "pronk/h um", "../hum", "pronk/-x", "pronk/h?m"] {
            assert!(Destination::new(repo, MAIN, false).is_err(), "{repo}");
        }
        assert!(Destination::new("pronk/hum", "", false).is_err());
        assert_eq!(escaped("refs/pr/1 ä"), "refs%2Fpr%2F1%20%C3%A4");
    }
}
