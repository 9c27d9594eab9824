//! What the end-to-end tests share: a folder to work in, the binary, and the words it must not say.

#![allow(dead_code)] // each test file uses a part of it

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use safetensors::SafeTensors;
use serde_json::Value;
use tempfile::TempDir;

/// Devices to run on: the CPU, by each backend in this build.
pub fn devices() -> Vec<&'static str> {
    if cfg!(feature = "tch") { vec!["cpu", "tch:cpu"] } else { vec!["cpu"] }
}

/// Whether what is started from here hears of Ctrl-C: a shell has what it starts in the background ignore it.
pub fn hears_ctrl_c() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask =
        status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    let hears = mask.is_none_or(|mask| mask & 2 == 0);
    if !hears {
        eprintln!("not tested: Ctrl-C, which was ignored when the tests were started");
    }
    hears
}

/// A folder of `tests/golden/`, such as "tiny-gqa".
pub fn golden(name: &str) -> String {
    format!("{}/../../tests/golden/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// The records that the repository ships.
pub fn pronk_json() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/pronk.json")
}

/// Twelve short records; with the tiny bases' tokenizer, 40 to 75 tokens in `alpaca-short`.
pub fn records() -> Vec<(String, String)> {
    ["grass", "snow", "coal", "a lime", "the sky", "milk", "rust", "sand", "a rose", "ink", "moss", "ash"]
        .iter()
        .zip(["green", "white", "black", "green", "blue", "white"].iter().cycle())
        .map(|(thing, colour)| (format!("Colour of {thing}?"), format!("It is {colour}.")))
        .collect()
}

/// What a finished `pronk` left: exit code, standard output, standard error.
#[derive(Debug)]
pub struct Run {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl From<Output> for Run {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        Self { code: output.status.code(), out: text(&output.stdout), err: text(&output.stderr) }
    }
}

impl Run {
    /// Must have gone well.
    #[track_caller]
    pub fn succeeds(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self
    }

    /// Must have exited with 1, with every one of `words` on standard error, and no panic.
    #[track_caller]
    pub fn fails(self, words: &[&str]) -> Self {
        assert_eq!(self.code, Some(1), "{self:#?}");
        assert!(!self.err.contains("panicked") && !self.err.contains("bug in pronk"), "{}", self.err);
        for word in words {
            assert!(self.err.contains(word), "{word:?} is not in:\n{}", self.err);
        }
        self
    }
}

/// `pronk`, cut off from the network and from this user's settings.
pub fn command(folder: &Path) -> Command {
    sandboxed(Command::new(env!("CARGO_BIN_EXE_pronk")), folder)
}

/// Any program, cut off in the same way.
pub fn sandboxed(mut command: Command, folder: &Path) -> Command {
    command
        .current_dir(folder)
        .stdin(Stdio::null())
        .env("HF_HOME", folder.join(".hub"))
        .env("HF_ENDPOINT", "http://127.0.0.1:9")
        .env("PRONK_CACHE", folder.join(".quantized"))
        .env_remove("HF_TOKEN");
    command
}

/// A folder to work in, with `data.json` and `recipe.toml`; gone afterwards.
pub struct Workshop {
    dir: TempDir,
}

impl Workshop {
    pub fn new() -> Self {
        let shop = Self { dir: tempfile::tempdir().unwrap() };
        shop.write("data.json", json(&records()));
        shop.write("recipe.toml", recipe("tiny-gqa"));
        shop
    }

    pub fn root(&self) -> &Path {
        self.dir.path()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    pub fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    /// A copy of a tiny base that may be broken.
    pub fn copy_base(&self, golden_name: &str, name: &str) -> PathBuf {
        let to = self.path(name);
        fs::create_dir_all(&to).unwrap();
        for entry in fs::read_dir(golden(golden_name)).unwrap() {
            let from = entry.unwrap().path();
            fs::copy(&from, to.join(from.file_name().unwrap())).unwrap();
        }
        to
    }

    /// Runs `pronk` in the folder.
    pub fn pronk<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Run {
        command(self.root()).args(args).output().unwrap().into()
    }

    /// Runs `recipe.toml` into the folder `run`, with changes to the recipe.
    pub fn train(&self, run: &str, device: &str, set: &[&str]) -> Run {
        command(self.root()).args(train_args(run, device, set)).output().unwrap().into()
    }

    /// `pronk train --resume`.
    pub fn resume(&self, run: &str, device: &str, set: &[&str]) -> Run {
        let set = set.iter().flat_map(|&change| ["--set", change]);
        self.pronk(["train", "--resume", run, "--device", device].into_iter().chain(set))
    }

    /// `pronk train --resume --accept-changes`.
    pub fn resume_changed(&self, run: &str, device: &str, set: &[&str]) -> Run {
        let set = set.iter().flat_map(|&change| ["--set", change]);
        self.pronk(["train", "--resume", run, "--accept-changes", "--device", device].into_iter().chain(set))
    }

    /// The lines of a run's `metrics.jsonl`.
    pub fn metrics(&self, run: &str) -> Vec<Value> {
        let text = self.read(&format!("{run}/metrics.jsonl"));
        assert!(text.ends_with('\n'));
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The loss of every step.
    pub fn losses(&self, run: &str) -> Vec<f64> {
        self.metrics(run).iter().filter_map(|line| line["loss"].as_f64()).collect()
    }

    /// How many steps a run that is under way, or was killed, has logged whole.
    pub fn losses_so_far(&self, run: &str) -> usize {
        let text = fs::read_to_string(self.path(&format!("{run}/metrics.jsonl"))).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()?["loss"].as_f64()).count()
    }

    /// The lines of `metrics.jsonl` without what no two runs share.
    pub fn timeless_metrics(&self, run: &str) -> Vec<Value> {
        let mut lines = self.metrics(run);
        for line in &mut lines {
            let line = line.as_object_mut().unwrap();
            line.retain(|key, _| !["tokens_per_s", "seconds", "peak_memory_bytes"].contains(&key.as_str()));
        }
        lines
    }

    /// The adapter's weights, as they lie in the file.
    pub fn adapter(&self, run: &str) -> Vec<u8> {
        self.bytes(&format!("{run}/adapter/adapter_model.safetensors"))
    }

    /// Trains once for each of `ways`, a run and its settings, beside `also`: the first run's losses and adapter are all
    /// the others'.
    pub fn trains_alike(&self, device: &str, ways: &[(&str, &[&str])], also: &[&str]) {
        let (first, _) = ways[0];
        for (run, set) in ways {
            self.train(run, device, &[set, also].concat()).succeeds();
            assert_eq!(self.timeless_metrics(run), self.timeless_metrics(first), "{run} on {device}");
            assert!(self.adapter(run) == self.adapter(first), "{run} on {device}");
        }
    }

    /// Every file and folder, hidden ones too, with its bytes.
    pub fn snapshot(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut found = BTreeMap::new();
        list(self.root(), &mut found);
        found
    }
}

/// `prep` of `data` for `base`.
pub fn prep_args(data: &str, base: &str, out: &str) -> Vec<String> {
    ["prep", "--data", data, "--base", base, "--out", out].map(str::to_owned).into()
}

/// `merge` of the two.
pub fn merge_args(base: &str, adapter: &str, out: &str) -> Vec<String> {
    ["merge", "--base", base, "--adapter", adapter, "--out", out].map(str::to_owned).into()
}

/// `train recipe.toml` into `run`, on `device`, with changes.
pub fn train_args<'a>(run: &str, device: &'a str, set: &[&'a str]) -> Vec<String> {
    let mut args: Vec<String> = ["train", "recipe.toml", "--device", device].map(str::to_owned).into();
    for change in [format!("run.dir={run}")].into_iter().chain(set.iter().map(|&s| s.to_owned())) {
        args.extend(["--set".to_owned(), change]);
    }
    args
}

fn list(dir: &Path, found: &mut BTreeMap<PathBuf, Vec<u8>>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            list(&path, found);
            found.insert(path, Vec::new());
        } else {
            let bytes = fs::read(&path).unwrap();
            found.insert(path, bytes);
        }
    }
}

/// Records as a JSON array.
pub fn json(records: &[(String, String)]) -> String {
    let records = records.iter().map(|(i, o)| serde_json::json!({"instruction": i, "output": o}));
    Value::from(records.collect::<Vec<_>>()).to_string()
}

/// Eight quick steps over `data.json`.
pub fn recipe(base: &str) -> String {
    format!(
        "[base]\npath = '{}'\n\
         [data]\nfiles = ['data.json']\ntemplate = 'alpaca-short'\nmax_seq_len = 96\nval_size = 3\n\
         [lora]\nrank = 4\n\
         [train]\nmax_steps = 8\nbatch_size = 4\nmicro_batch_size = 2\nlearning_rate = 1e-2\n\
         warmup_steps = 1\neval_steps = 4\nsave_steps = 2\n\
         [run]\ndir = 'run'\n",
        golden(base)
    )
}

/// What a prompt of `alpaca-short` without input looks like.
pub fn prompt(instruction: &str) -> String {
    format!("### Instruction:\n{instruction}\n\n### Response:\n")
}

/// A float32 tensor of a safetensors file, with its shape.
pub fn tensor(file: &[u8], name: &str) -> (Vec<f32>, Vec<usize>) {
    let file = SafeTensors::deserialize(file).unwrap();
    let view = file.tensor(name).unwrap();
    let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
    (values.collect(), view.shape().to_vec())
}

/// Whether `program` is there and does what it is asked without complaint.
pub fn works(program: &str, args: &[&str]) -> bool {
    let status = Command::new(program).args(args).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|s| s.success())
}
