//! A tokenizer from a Hugging Face directory: its `tokenizer.json`, or where there is none, its
//! `tokenizer.model`.

use std::borrow::{Borrow, Cow};
use std::collections::HashMap;
use std::path::Path;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;

use super::{Parts, growth, sentence_piece, token_name};
use crate::error::DataError;
use crate::files;
use crate::guarded::guarded;

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
    let (path, old) = (dir.join("tokenizer.json"), dir.join("tokenizer.model"));
    let mut settings = Settings {
        config: object(&dir.join("tokenizer_config.json"))?,
        special: object(&dir.join("special_tokens_map.json"))?,
        generation: object(&dir.join("generation_config.json"))?,
        model: object(&dir.join("config.json"))?,
    };
    let (tokenizer, place) = if !path.exists() && old.exists() {
        let added = object(&dir.join("added_tokens.json"))?;
        let Parts { tokenizer, place, config, .. } = sentence_piece::read(&old, &settings.config, &added)?;
        settings.take_over(&config);
        (tokenizer, place)
    } else {
        (tokenizer_json(&path)?, path.display().to_string())
    };
    let error = |message: String| DataError::Tokenizer { place: place.clone(), message };
    let eos = settings.eos(&tokenizer).map_err(error)?;
    let bos = settings.bos(&tokenizer).map_err(error)?;
    settings.complete(dir, &tokenizer, bos, eos.first().copied())?;
    Ok(Parts { tokenizer, place, bos, eos, config: settings.config })
}

fn tokenizer_json(path: &Path) -> Result<Tokenizer, DataError> {
    let bytes = files::read(path, "read the tokenizer")?;
    let text = files::text(path, &bytes)?;
    let error = |message: String| DataError::Tokenizer { place: path.display().to_string(), message };
    guarded(|| whole_tokenizer(text)).flatten().map_err(error)
}

fn whole_tokenizer(text: &str) -> Result<Tokenizer, String> {
    check(text)?;
    let mut tokenizer =
        Tokenizer::from_bytes(text).map_err(|e| format!("not a valid tokenizer.json: {e}"))?;
    // Some published files still hold the padding and truncation of their training run.
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|e| e.to_string())?;
    growth::check(&tokenizer)?;
    Ok(tokenizer)
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
    /// A special token's name: a string, or an object with the string as `content`. Early conversions
    /// of Llama left the strings empty.
    fn token_name(&self, key: &str) -> Option<&str> {
        let maps = [&self.config, &self.special].into_iter();
        maps.filter_map(|map| token_name(map.get(key)?)).find(|name| !name.is_empty())
    }

    /// Names of special tokens out of the vocabulary, for those that the directory does not tell.
    fn take_over(&mut self, vocabulary: &Map<String, Value>) {
        for key in ["bos_token", "eos_token", "unk_token", "pad_token"] {
            if let (None, Some(name)) = (self.token_name(key), vocabulary.get(key)) {
                self.config.insert(key.to_owned(), name.clone());
            }
        }
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
        if let Some(templates) = chat_templates(dir)? {
            self.config.insert("chat_template".to_owned(), templates);
        }
        Ok(())
    }
}

/// The chat templates that lie in files of their own, which go before those in `tokenizer_config.json`: one as
/// text, several as `[{"name": .., "template": ..}]`.
fn chat_templates(dir: &Path) -> Result<Option<Value>, DataError> {
    let read = |path: &Path| -> Result<Value, DataError> {
        let bytes = files::read(path, "read the chat template")?;
        files::text(path, &bytes).map(Value::from)
    };
    let beside = dir.join("chat_template.jinja");
    let default = if beside.exists() { Some(read(&beside)?) } else { None };
    let mut others = Vec::new();
    for entry in dir.join("additional_chat_templates").read_dir().into_iter().flatten().flatten() {
        let path = entry.path();
        if let (Some("jinja"), Some(name)) = (path.extension().and_then(|e| e.to_str()), path.file_stem()) {
            others.push((name.to_string_lossy().into_owned(), read(&path)?));
        }
    }
    if others.is_empty() {
        return Ok(default);
    }
    others.sort_by(|a, b| a.0.cmp(&b.0));
    let all = default.map(|source| ("default".to_owned(), source)).into_iter().chain(others);
    Ok(Some(all.map(|(name, template)| json!({"name": name, "template": template})).collect()))
}

/// The token, if any, that the tokenizer's post-processor puts in front of a text.
fn added_in_front(tokenizer: &Tokenizer) -> Result<Option<u32>, String> {
    let ids = |special| {
        let encode = || tokenizer.encode_fast("a", special).map_err(|error| error.to_string());
        guarded(encode).flatten().map(|encoding| encoding.get_ids().to_vec())
    };
    let (with, without) = (ids(true)?, ids(false)?);
    Ok(if with.len() > without.len() && with.first() != without.first() {
        with.first().copied()
    } else {
        None
    })
}

/// The parts of `tokenizer.json` that the tokenizers crate takes as they are.
#[derive(Deserialize)]
struct File<'a> {
    #[serde(borrow)]
    model: Model<'a>,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    added_tokens: Value,
}

/// Of a BPE.
#[derive(Deserialize)]
struct Model<'a> {
    #[serde(borrow, default)]
    vocab: Vocab<'a>,
    #[serde(borrow, default)]
    merges: Vec<Merge<'a>>,
}

#[derive(Deserialize)]
#[serde(untagged)]
#[allow(clippy::zero_sized_map_values)] // a set would be read from a list
enum Vocab<'a> {
    #[serde(borrow)]
    Ids(HashMap<Text<'a>, IgnoredAny>),
    /// Those of other models.
    Other(IgnoredAny),
}

impl Default for Vocab<'_> {
    fn default() -> Self {
        Self::Other(IgnoredAny)
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge<'a> {
    #[serde(borrow)]
    Pair([Text<'a>; 2]),
    #[serde(borrow)]
    Line(Text<'a>),
}

/// A text that stays in the file where nothing in it is escaped: there are a hundred thousand.
#[derive(Deserialize, PartialEq, Eq, Hash)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl Borrow<str> for Text<'_> {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// The tokenizers crate panics on what is wrong in these; refuse such a file first.
fn check(text: &str) -> Result<(), String> {
    let file: File<'_> =
        serde_json::from_str(text).map_err(|e| format!("not a valid tokenizer.json: {e}"))?;
    check_merges(&file.model)?;
    check_post_processor(&file.post_processor)?;
    growth::check_added(&file.normalizer, &file.added_tokens)
}

/// Whether the template of a single text asks for no more than there is.
fn check_post_processor(processor: &Value) -> Result<(), String> {
    if let Some(Value::Array(several)) = processor.get("processors") {
        return several.iter().try_for_each(check_post_processor);
    }
    let Some(Value::Array(pieces)) = processor.get("single") else { return Ok(()) };
    for piece in pieces {
        let id = |kind: &str| piece.get(kind)?.get("id")?.as_str();
        if id("Sequence") == Some("B") {
            return Err("the post_processor's template of a single text asks for a second one, B".to_owned());
        }
        let known =
            |token: &&str| processor.get("special_tokens").is_some_and(|all| all.get(token).is_some());
        if let Some(token) = id("SpecialToken").filter(|token| !known(token)) {
            return Err(format!(
                "the post_processor's template names {token:?}, which is not among its special_tokens"
            ));
        }
    }
    Ok(())
}

/// Whether every merge's parts and result are tokens.
fn check_merges(model: &Model<'_>) -> Result<(), String> {
    let Vocab::Ids(tokens) = &model.vocab else { return Ok(()) };
    for (number, merge) in model.merges.iter().enumerate() {
        let (left, right) = match merge {
            Merge::Pair([left, right]) => (&*left.0, &*right.0),
            Merge::Line(line) => line
                .0
                .split_once(' ')
                .ok_or_else(|| format!("merge {number} is {:?}, expected two tokens", line.0))?,
        };
        let merged = format!("{left}{right}");
        if let Some(missing) = [left, right, &merged].into_iter().find(|token| !tokens.contains_key(*token)) {
            return Err(format!(
                "merge {number} needs the token {missing:?}, which is not in the vocabulary"
            ));
        }
    }
    Ok(())
}
