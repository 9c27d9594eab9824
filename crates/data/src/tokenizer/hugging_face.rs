//! A tokenizer from a Hugging Face directory.

use std::collections::HashSet;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};
use tokenizers::Tokenizer;

use super::Parts;
use crate::error::DataError;
use crate::files;

/// Everything the directory says about BOS and EOS.
struct Settings {
    /// `tokenizer_config.json`, empty where there is none.
    config: Map<String, Value>,
    /// `special_tokens_map.json`.
    special: Map<String, Value>,
    /// `generation_config.json`.
    generation: Map<String, Value>,
    /// `config.json`.
    model: Map<String, Value>,
}

pub(super) fn read(dir: &Path) -> Result<Parts, DataError> {
    let path = dir.join("tokenizer.json");
    let place = path.display().to_string();
    let bytes = files::read(&path, "read the tokenizer")?;
    let text = files::text(&path, &bytes)?;
    let error = |message: String| DataError::Tokenizer { place: place.clone(), message };
    check_merges(text).map_err(error)?;
    let tokenizer =
        Tokenizer::from_bytes(text).map_err(|e| error(format!("not a valid tokenizer.json: {e}")))?;

    let mut settings = Settings {
        config: object(&dir.join("tokenizer_config.json"))?,
        special: object(&dir.join("special_tokens_map.json"))?,
        generation: object(&dir.join("generation_config.json"))?,
        model: object(&dir.join("config.json"))?,
    };
    let eos = settings.eos(&tokenizer).map_err(error)?;
    let bos = settings.bos(&tokenizer).map_err(error)?;
    settings.complete(dir, &tokenizer, bos, eos.first().copied())?;
    Ok(Parts { tokenizer, place, bos, eos, config: settings.config })
}

/// A JSON object from a file that need not be there.
fn object(path: &Path) -> Result<Map<String, Value>, DataError> {
    if !path.exists() {
        return Ok(Map::new());
    }
    let bytes = files::read(path, "read the tokenizer's settings")?;
    serde_json::from_str(files::text(path, &bytes)?).map_err(|error| DataError::Tokenizer {
        place: path.display().to_string(),
        message: format!("expected a JSON object: {error}"),
    })
}

impl Settings {
    /// A special token's name: a string, or an object with the string as `content`.
    fn token_name(&self, key: &str) -> Option<&str> {
        [&self.config, &self.special].into_iter().find_map(|map| {
            let value = map.get(key)?;
            value.as_str().or_else(|| value.get("content")?.as_str())
        })
    }

    /// The ids under `key` of the model's own files: one number or a list of them.
    fn token_ids(&self, key: &str) -> Vec<u32> {
        let number = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let lists = [&self.generation, &self.model].into_iter().filter_map(|map| map.get(key));
        lists
            .flat_map(|value| match value {
                Value::Array(ids) => ids.iter().filter_map(number).collect(),
                one => number(one).into_iter().collect::<Vec<_>>(),
            })
            .collect()
    }

    fn id_of(&self, key: &str, tokenizer: &Tokenizer) -> Result<Option<u32>, String> {
        let Some(name) = self.token_name(key) else { return Ok(None) };
        tokenizer.token_to_id(name).map(Some).ok_or_else(|| {
            format!("tokenizer_config.json names {name:?} as {key}, but tokenizer.json has no such token")
        })
    }

    /// All ids that end a text, the learned one first.
    fn eos(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>, String> {
        let mut ids: Vec<u32> = self.id_of("eos_token", tokenizer)?.into_iter().collect();
        for id in self.token_ids("eos_token_id") {
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        Ok(ids)
    }

    /// The id that begins a text, if one is to be added.
    fn bos(&self, tokenizer: &Tokenizer) -> Result<Option<u32>, String> {
        let named = self.id_of("bos_token", tokenizer)?;
        match self.config.get("add_bos_token").and_then(Value::as_bool) {
            Some(false) => Ok(None),
            Some(true) => {
                named.or_else(|| self.token_ids("bos_token_id").first().copied()).map(Some).ok_or_else(|| {
                    "add_bos_token is true, but no bos_token is named; add it to tokenizer_config.json"
                        .to_owned()
                })
            }
            None => {
                let class = self.config.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
                // transformers' Llama classes add BOS unless told otherwise, whatever tokenizer.json says.
                let by_class =
                    class.starts_with("LlamaTokenizer") && tokenizer.get_post_processor().is_none();
                Ok(if by_class { named } else { added_in_front(tokenizer)? })
            }
        }
    }

    /// Makes `config` fit to be saved: tokens by name, the chat template included, a class every reader knows.
    fn complete(
        &mut self,
        dir: &Path,
        tokenizer: &Tokenizer,
        bos: Option<u32>,
        eos: Option<u32>,
    ) -> Result<(), DataError> {
        for (key, id) in [("bos_token", bos), ("eos_token", eos)] {
            let name = self.token_name(key).map(str::to_owned).or_else(|| tokenizer.id_to_token(id?));
            if let Some(name) = name {
                self.config.insert(key.to_owned(), Value::String(name));
            }
        }
        for key in ["unk_token", "pad_token"] {
            if let Some(name) = self.token_name(key).map(str::to_owned) {
                self.config.insert(key.to_owned(), Value::String(name));
            }
        }
        self.config.insert("add_bos_token".to_owned(), Value::Bool(bos.is_some()));
        // transformers 5 writes a class name that transformers 4 does not know, and fields only it reads.
        let class = self.config.get("tokenizer_class").and_then(Value::as_str);
        if class.is_none_or(|class| class == "TokenizersBackend") {
            self.config.insert("tokenizer_class".to_owned(), Value::from("PreTrainedTokenizerFast"));
        }
        for key in ["backend", "is_local", "local_files_only"] {
            self.config.remove(key);
        }
        let beside = dir.join("chat_template.jinja");
        if !self.config.contains_key("chat_template") && beside.exists() {
            let bytes = files::read(&beside, "read the chat template")?;
            self.config.insert("chat_template".to_owned(), Value::from(files::text(&beside, &bytes)?));
        }
        Ok(())
    }
}

/// The token, if any, that the tokenizer's post-processor puts in front of a text.
fn added_in_front(tokenizer: &Tokenizer) -> Result<Option<u32>, String> {
    let ids = |special| tokenizer.encode_fast("a", special).map(|e| e.get_ids().to_vec());
    let (with, without) = (ids(true).map_err(|e| e.to_string())?, ids(false).map_err(|e| e.to_string())?);
    Ok(if with.len() > without.len() && with.first() != without.first() {
        with.first().copied()
    } else {
        None
    })
}

/// The part of `tokenizer.json` that holds a BPE's merges.
#[derive(Deserialize)]
struct Merges {
    model: MergesModel,
}

#[derive(Deserialize)]
struct MergesModel {
    #[serde(default)]
    vocab: Value,
    #[serde(default)]
    merges: Vec<Merge>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Line(String),
}

/// The tokenizers crate panics on a merge whose result is longer than every token; refuse such a file first.
fn check_merges(text: &str) -> Result<(), String> {
    let file: Merges = serde_json::from_str(text).map_err(|e| format!("not a valid tokenizer.json: {e}"))?;
    let Value::Object(vocab) = &file.model.vocab else { return Ok(()) };
    let tokens: HashSet<&str> = vocab.keys().map(String::as_str).collect();
    for (number, merge) in file.model.merges.iter().enumerate() {
        let (left, right) = match merge {
            Merge::Pair(left, right) => (left.as_str(), right.as_str()),
            Merge::Line(line) => line
                .split_once(' ')
                .ok_or_else(|| format!("merge {number} is {line:?}, expected two tokens"))?,
        };
        let merged = format!("{left}{right}");
        if let Some(missing) = [left, right, &merged].into_iter().find(|token| !tokens.contains(*token)) {
            return Err(format!(
                "merge {number} needs the token {missing:?}, which is not in the vocabulary"
            ));
        }
    }
    Ok(())
}
