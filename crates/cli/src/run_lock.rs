//! What a run is made of, written down in its folder as `lock.json`, to be held against what is there when it goes on.

use std::fs;
use std::io;
use std::path::PathBuf;

use chrono::{SecondsFormat, Utc};
use miette::{IntoDiagnostic, Result, WrapErr, miette};
use pronk_data::DataFile;
use pronk_kernels::available_devices;
use pronk_model::Base;
use pronk_train::{RunFolder, sha256_of, sha256_of_file};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::recipe::Recipe;

/// Its file name.
pub const LOCK: &str = "lock.json";

/// The backends of this binary, as their Cargo features are called.
const FEATURES: [(&str, bool); 6] = [
    ("flex", cfg!(feature = "flex")),
    ("tch", cfg!(feature = "tch")),
    ("cuda", cfg!(feature = "cuda")),
    ("rocm", cfg!(feature = "rocm")),
    ("vulkan", cfg!(feature = "vulkan")),
    ("metal", cfg!(feature = "metal")),
];

/// All that a run's result depends on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunLock {
    pub recipe: LockedRecipe,
    pub data: Vec<LockedFile>,
    /// Its hash is over the configuration, and samples of the weights.
    pub base: LockedFile,
    /// Each time that a process took the run up.
    pub sessions: Vec<Session>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LockedRecipe {
    /// Of `recipe.toml`.
    pub sha256: String,
    /// What it says.
    pub knobs: Map<String, Value>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockedFile {
    pub path: PathBuf,
    pub sha256: String,
}

/// A process that worked on a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// When, in UTC.
    pub started: String,
    /// Steps that were done.
    pub step: u64,
    /// Its version.
    pub pronk: String,
    pub features: Vec<String>,
    pub device: String,
    /// What had changed, and was accepted.
    pub accepted: Vec<String>,
}

impl RunLock {
    /// As things are now; before any session.
    pub fn new(recipe: &Recipe, base: LockedFile) -> Result<Self> {
        let sha256 = sha256_of(&recipe.to_toml()?);
        let knobs = match serde_json::to_value(recipe).into_diagnostic()? {
            Value::Object(knobs) => knobs,
            _ => Map::new(),
        };
        let files = recipe.data.files.iter().cloned().map(DataFile::from);
        let locked = |DataFile { path, .. }| {
            let sha256 = sha256_of_file(&path).into_diagnostic()?;
            Ok(LockedFile { path, sha256 })
        };
        let data = files.map(locked).collect::<Result<_>>()?;
        Ok(Self { recipe: LockedRecipe { sha256, knobs }, data, base, sessions: Vec::new() })
    }

    /// The run's own, if it has come so far.
    pub fn read(folder: &RunFolder) -> Result<Option<Self>> {
        let path = folder.root().join(LOCK);
        let text = match fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text.into_diagnostic().wrap_err_with(|| path.display().to_string())?,
        };
        serde_json::from_slice(&text).map(Some).map_err(|e| {
            miette!("{}: damaged: {e}; remove it to go on, if nothing has changed since", path.display())
        })
    }

    pub fn write(&self, folder: &RunFolder) -> Result<()> {
        let mut json = serde_json::to_vec_pretty(self).into_diagnostic()?;
        json.push(b'\n');
        folder.replace(LOCK, &json).into_diagnostic()
    }

    /// What is different `now`, each by name.
    pub fn changes(&self, now: &Self) -> Vec<String> {
        let mut changes = Vec::new();
        knob_changes("", &self.recipe.knobs, &now.recipe.knobs, &mut changes);
        for file in &self.data {
            let same = now.data.iter().find(|other| other.path == file.path);
            if same.is_some_and(|other| other.sha256 != file.sha256) {
                changes.push(format!("data: {} holds something else", file.path.display()));
            }
        }
        if self.base.sha256 != now.base.sha256 {
            changes.push(format!("base: {} is another", now.base.path.display()));
        }
        changes
    }

    /// The last process to work on the run.
    pub fn last_session(&self) -> Option<&Session> {
        self.sessions.last()
    }
}

impl LockedFile {
    /// A base as it is named, not as it is quantized.
    pub fn of_base(base: &Base) -> Result<Self> {
        Ok(Self { path: base.path.clone(), sha256: base.fingerprint().into_diagnostic()? })
    }

    /// Its name without its folder, and its hash.
    pub fn named(&self) -> (String, String) {
        let name = self.path.file_name().unwrap_or(self.path.as_os_str());
        (name.to_string_lossy().into_owned(), self.sha256.clone())
    }
}

impl Session {
    /// The one that begins now, with `step` steps done.
    pub fn new(step: u64, device: &str, accepted: Vec<String>) -> Self {
        Self {
            started: Utc::now().to_rfc3339_opts(SecondsFormat::Secs, true),
            step,
            pronk: env!("CARGO_PKG_VERSION").into(),
            features: FEATURES.iter().filter(|(_, on)| *on).map(|(name, _)| (*name).to_owned()).collect(),
            device: device_name(device),
            accepted,
        }
    }

    /// What is different `now` and lets the last bits of every number differ.
    pub fn differences(&self, now: &Self) -> Option<String> {
        let of = |session: &Self| format!("pronk {} on {}", session.pronk, session.device);
        let (then, now) = (of(self), of(now));
        (then != now).then(|| format!("this run was {then} and goes on as {now}: its last bits may differ"))
    }
}

/// The device that "auto" stands for.
fn device_name(device: &str) -> String {
    let first = || available_devices().into_iter().find_map(|(_, found)| found.ok()?.into_iter().next());
    if device == "auto" { first().unwrap_or_else(|| device.into()) } else { device.into() }
}

/// Knobs of two recipes that are not the same, `table.knob`.
fn knob_changes(above: &str, was: &Map<String, Value>, is: &Map<String, Value>, changes: &mut Vec<String>) {
    let added = is.keys().filter(|name| !was.contains_key(*name));
    for name in was.keys().chain(added) {
        match (was.get(name), is.get(name)) {
            (was, is) if was == is => {}
            (Some(Value::Object(was)), Some(Value::Object(is))) => {
                knob_changes(&format!("{above}{name}."), was, is, changes);
            }
            (was, is) => {
                let shown = |value: Option<&Value>| value.map_or("left out".to_owned(), Value::to_string);
                changes.push(format!("recipe: {above}{name} was {}, is {}", shown(was), shown(is)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn changed_knobs_are_named() {
        let was = json!({"train": {"max_steps": 8, "seed": 1}, "base": {"path": "a"}});
        let is = json!({"train": {"max_steps": 9, "seed": 1, "epochs": 2.0}, "base": {"path": "a"}});
        let mut changes = Vec::new();
        knob_changes("", was.as_object().unwrap(), is.as_object().unwrap(), &mut changes);
        assert_eq!(
            changes,
            ["recipe: train.max_steps was 8, is 9", "recipe: train.epochs was left out, is 2.0"]
        );
    }
}
