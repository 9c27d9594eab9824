//! Text to token ids and back, and which ids begin and end a text.

mod added;
mod encoder;
mod gguf;
mod growth;
mod hugging_face;
mod sentence_piece;
mod stream;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::Path;
use std::sync::OnceLock;

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use tokenizers::Tokenizer;

use crate::error::DataError;
use crate::files;
use crate::gguf_vocabulary::{self, GgufVocabulary};
use crate::guarded::guarded;

pub use encoder::Encoder;
pub use stream::DecodeStream;

/// A tokenizer that knows how its model's texts begin and end.
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    /// Where it came from, for error messages.
    place: String,
    /// Some only if a text is to begin with it.
    bos: Option<u32>,
    /// The learned one first.
    eos: Vec<u32>,
    /// Whether a text begins with a space that is not in it.
    adds_space: bool,
    /// Tokens that were added to what was read, by id.
    added: BTreeMap<u32, String>,
    /// What [`TextTokenizer::save`] writes as `tokenizer_config.json`.
    config: Map<String, Value>,
    /// Made when it is first asked for: the whole vocabulary goes into it.
    fingerprint: OnceLock<String>,
}

impl fmt::Debug for TextTokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TextTokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .finish_non_exhaustive()
    }
}

/// The parts a reader has to find, whatever the format.
pub(crate) struct Parts {
    pub(crate) tokenizer: Tokenizer,
    /// Where it came from, for error messages.
    pub(crate) place: String,
    pub(crate) bos: Option<u32>,
    pub(crate) eos: Vec<u32>,
    pub(crate) config: Map<String, Value>,
}

impl TextTokenizer {
    /// Reads `tokenizer.json` from a Hugging Face directory, and from the other JSON files beside it which tokens
    /// begin and end a text.
    ///
    /// EOS is the `eos_token` of `tokenizer_config.json` or `special_tokens_map.json`, else the first
    /// `eos_token_id` of `generation_config.json` or `config.json`; the other ids listed there also end a
    /// generated text. BOS is added if `add_bos_token` says so, and where it says nothing, if the tokenizer's own
    /// post-processor does.
    pub fn from_dir(dir: &Path) -> Result<Self, DataError> {
        hugging_face::read(dir).and_then(Self::from_parts)
    }

    /// Builds the tokenizer that a GGUF file describes.
    pub fn from_gguf(vocabulary: &GgufVocabulary) -> Result<Self, DataError> {
        gguf_vocabulary::build(vocabulary).and_then(Self::from_parts)
    }

    fn from_parts(parts: Parts) -> Result<Self, DataError> {
        let Parts { tokenizer, place, bos, eos, config } = parts;
        let error = |message: String| DataError::Tokenizer { place: place.clone(), message };
        if eos.is_empty() {
            return Err(error(
                "no EOS token is named; a model that never learns to stop is of no use. Add eos_token \
                              to tokenizer_config.json, or eos_token_id to config.json"
                    .to_owned(),
            ));
        }
        for (name, id) in bos.iter().map(|id| ("BOS", *id)).chain(eos.iter().map(|id| ("EOS", *id))) {
            if tokenizer.id_to_token(id).is_none() {
                return Err(error(format!(
                    "the {name} token id {id} is not in the vocabulary of {} tokens",
                    tokenizer.get_vocab_size(true)
                )));
            }
        }
        let (adds_space, added, fingerprint) = (false, BTreeMap::new(), OnceLock::new());
        let mut found = Self { tokenizer, place, bos, eos, adds_space, added, config, fingerprint };
        // `SentencePiece`'s dummy prefix, however tokenizer.json spells it out.
        let first = found.encode("a")?.first().and_then(|&id| found.token(id));
        found.adds_space = first.is_some_and(|token| token.starts_with('▁'));
        Ok(found)
    }

    /// The token that begins a text; `None` if the tokenizer adds none.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text, and that every response learns to end in.
    pub fn eos(&self) -> u32 {
        self.eos.first().copied().unwrap_or_default() // never empty, see `from_parts`
    }

    /// All tokens that end a generated text; the first is [`TextTokenizer::eos`].
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    /// How many tokens there are, added ones included. A model's `vocab_size` may be larger, never smaller.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// The chat template that came with the tokenizer; of several, the one called "default".
    pub fn chat_template(&self) -> Option<&str> {
        self.named_chat_template(None).ok()
    }

    /// The chat template called `name` ("default" where nothing is said).
    pub(crate) fn named_chat_template(&self, name: Option<&str>) -> Result<&str, DataError> {
        let wanted = name.unwrap_or("default");
        let failed = |message: String| {
            let name = name.map_or_else(|| "chat".to_owned(), |name| format!("chat:{name}"));
            Err(DataError::Template { name, message })
        };
        let named = |entry: &Value| entry.get("name").and_then(Value::as_str).map(str::to_owned);
        match self.config.get("chat_template") {
            Some(Value::String(source)) if wanted == "default" => Ok(source),
            Some(Value::Array(several)) => {
                let found = several.iter().find(|entry| named(entry).as_deref() == Some(wanted));
                if let Some(source) = found.and_then(|entry| entry.get("template")?.as_str()) {
                    return Ok(source);
                }
                let names: Vec<String> = several.iter().filter_map(named).collect();
                failed(format!("the base has no chat template {wanted:?}; it has {}", names.join(", ")))
            }
            Some(Value::String(_)) => failed("the base has one chat template; take \"chat\"".to_owned()),
            _ => failed(
                "the base has no chat template, neither in tokenizer_config.json nor in chat_template.jinja nor in \
                 its GGUF file; take \"alpaca\", or a template of your own"
                    .to_owned(),
            ),
        }
    }

    /// The special tokens by the names that chat templates know: `bos_token`, `eos_token`, ..
    pub(crate) fn special_tokens(&self) -> Vec<(String, String)> {
        let is_name = |key: &str| key.ends_with("_token") && !key.starts_with("add_");
        let named = self.config.iter().filter(|(key, _)| is_name(key));
        named.filter_map(|(key, value)| Some((key.clone(), token_name(value)?.to_owned()))).collect()
    }

    /// The tokens that are no text, such as `</s>` and `<|im_start|>`, with their spelling.
    pub fn control_tokens(&self) -> HashMap<u32, String> {
        let added = self.tokenizer.get_added_tokens_decoder();
        added.into_iter().filter(|(_, token)| token.special).map(|(id, token)| (id, token.content)).collect()
    }

    /// Token ids of `text`, with neither BOS nor EOS. The name of a special token inside `text` becomes that
    /// token, as in transformers.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let mut ids = Vec::new();
        self.encoder().encode(text, &mut ids)?;
        Ok(ids)
    }

    /// Token ids of a prompt: BOS first, if the tokenizer adds one.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let mut ids: Vec<u32> = self.bos.into_iter().collect();
        ids.extend(self.encode(text)?);
        Ok(ids)
    }

    /// The text of `ids`, special tokens left out. Bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String, DataError> {
        self.text_of(ids, true)
    }

    /// The text of `ids`, special tokens shown by name.
    pub fn decode_with_specials(&self, ids: &[u32]) -> Result<String, DataError> {
        self.text_of(ids, false)
    }

    fn text_of(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, DataError> {
        let decode = || self.tokenizer.decode(ids, skip_special_tokens).map_err(|error| error.to_string());
        let decoded = guarded(decode).flatten();
        decoded.map_err(|why| self.error(&format!("decode {} tokens", ids.len()), &why))
    }

    /// The vocabulary's own spelling of a token, such as `Ġthe` or `<|im_end|>`.
    pub fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// The id of a token by the vocabulary's own spelling.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// For many texts in a row; see [`Encoder`].
    pub fn encoder(&self) -> Encoder<'_> {
        Encoder::new(self)
    }

    /// For showing a text while it is generated.
    pub fn decode_stream(&self) -> DecodeStream<'_> {
        DecodeStream::new(self)
    }

    /// SHA-256 (hexadecimal) of everything that decides a text's token ids.
    pub fn fingerprint(&self) -> Result<&str, DataError> {
        if let Some(known) = self.fingerprint.get() {
            return Ok(known);
        }
        let mut hasher = Sha256::new();
        files::hash_field(&mut hasher, self.to_json(false)?.as_bytes());
        files::hash_field(&mut hasher, format!("bos {:?} eos {}", self.bos, self.eos()).as_bytes());
        Ok(self.fingerprint.get_or_init(|| files::hex(hasher)))
    }

    /// Writes [`TextTokenizer::files`] into `dir`, which has to exist.
    pub fn save(&self, dir: &Path) -> Result<(), DataError> {
        self.files()?.iter().try_for_each(|(name, text)| {
            files::write_atomically(&dir.join(name), &[text.as_bytes()], "write the tokenizer")
        })
    }

    /// `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` by name, for transformers and the
    /// other runtimes to load.
    pub fn files(&self) -> Result<[(&'static str, String); 3], DataError> {
        let special: Map<String, Value> = ["bos_token", "eos_token", "unk_token", "pad_token"]
            .into_iter()
            .filter_map(|name| {
                Some((name.to_owned(), self.config.get(name).filter(|v| !v.is_null())?.clone()))
            })
            .collect();
        Ok([
            ("tokenizer.json", self.to_json(true)? + "\n"),
            ("tokenizer_config.json", format!("{:#}\n", Value::Object(self.config.clone()))),
            ("special_tokens_map.json", format!("{:#}\n", json!(special))),
        ])
    }

    fn to_json(&self, pretty: bool) -> Result<String, DataError> {
        self.tokenizer.to_string(pretty).map_err(|error| self.error("serialize", &error))
    }

    fn error(&self, action: &str, error: &dyn fmt::Display) -> DataError {
        DataError::Tokenizer { place: self.place.clone(), message: format!("cannot {action}: {error}") }
    }
}

/// A special token's name: a string, or an object with the string as `content`.
pub(crate) fn token_name(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

#[cfg(test)]
pub(crate) mod tests;
