//! Tokens that are added to a tokenizer: by a recipe, or by an adapter that was trained with them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

use serde::Deserialize;
use serde_json::{Value, json};
use tokenizers::AddedToken;

use super::{TextTokenizer, growth};
use crate::error::DataError;
use crate::files;
use crate::guarded::guarded;

/// The file that a tokenizer travels as, beside an adapter too.
const TOKENIZER_JSON: &str = "tokenizer.json";

/// Of `tokenizer.json`, what is asked here.
#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<Numbered>,
}

#[derive(Deserialize)]
struct Numbered {
    id: u32,
    #[serde(flatten)]
    token: AddedToken,
}

impl TextTokenizer {
    /// Adds `tokens`, each matched whole wherever it stands in a text, and shown in answers: as axolotl's `tokens`, and
    /// transformers' `add_tokens`, have them.
    pub fn add_tokens(&mut self, tokens: &[String]) -> Result<(), DataError> {
        let refuse = |message: String| Err(DataError::AddedTokens { place: "tokens.add".into(), message });
        for token in tokens {
            if token.trim().is_empty() {
                return refuse(format!("expected tokens with a letter or a sign in them, found {token:?}"));
            }
            if let Some(id) = self.token_id(token) {
                return refuse(format!("{token:?} is token {id} already; leave it out"));
            }
            self.add(AddedToken::from(token.as_str(), false).normalized(false))?;
        }
        Ok(())
    }

    /// Adds the tokens of the tokenizer in `dir`, an adapter's folder, that this one does not have. Its others have to
    /// have the ids that they have here.
    pub fn add_tokens_of(&mut self, dir: &Path) -> Result<(), DataError> {
        let path = dir.join(TOKENIZER_JSON);
        if !path.exists() {
            return Ok(());
        }
        let bytes = files::read(&path, "read the tokenizer")?;
        let refuse = |message: String| DataError::AddedTokens { place: path.display().to_string(), message };
        let file: File =
            serde_json::from_slice(&bytes).map_err(|e| refuse(format!("not a valid tokenizer.json: {e}")))?;
        let by_id: BTreeMap<u32, AddedToken> =
            file.added_tokens.into_iter().map(|Numbered { id, token }| (id, token)).collect();
        for (id, token) in by_id {
            let content = token.content.clone();
            let found = match self.token_id(&content) {
                Some(found) => found,
                None => self.add(token)?,
            };
            if found != id {
                return Err(refuse(format!(
                    "expected its token {content:?} as {id}, found {found}: it is of another base, or of an adapter that \
                     cannot be loaded together with those before it"
                )));
            }
        }
        Ok(())
    }

    /// What was added, by id.
    pub fn added_tokens(&self) -> &BTreeMap<u32, String> {
        &self.added
    }

    /// Adds one that there is not yet, and gives its id.
    fn add(&mut self, token: AddedToken) -> Result<u32, DataError> {
        let (content, special) = (token.content.clone(), token.special);
        // Where transformers keeps a list of its own, a token that it lacks would be another one's.
        let listed = json!({
            "content": &content, "lstrip": token.lstrip, "normalized": token.normalized,
            "rstrip": token.rstrip, "single_word": token.single_word, "special": special,
        });
        let add = || {
            growth::normalized(&self.tokenizer, &content)?;
            self.tokenizer.add_tokens([token]).map_err(|error| error.to_string())
        };
        guarded(add).flatten().map_err(|why| self.error(&format!("add the token {content:?}"), &why))?;
        let id = self.token_id(&content).ok_or_else(|| DataError::AddedTokens {
            place: "tokens.add".into(),
            message: format!("{content:?} could not be added"),
        })?;
        if let Some(Value::Object(list)) = self.config.get_mut("added_tokens_decoder") {
            list.insert(id.to_string(), listed);
        }
        self.added.insert(id, content);
        self.fingerprint = OnceLock::new();
        Ok(id)
    }
}
