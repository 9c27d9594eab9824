//! A `tokenizer.model`, as SentencePiece writes it: the vocabulary that GGUF files of model "llama" hold
//! too, in a protocol buffer (`sentencepiece_model.proto`).

use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::Parts;
use crate::error::DataError;
use crate::files;
use crate::gguf_vocabulary::{self, GgufVocabulary};

/// `TrainerSpec.model_type` of a vocabulary of merges.
const BPE: u64 = 2;
/// What it is where the file leaves it out: a unigram model.
const UNIGRAM: u64 = 1;

/// Reads `path`. `config` is the directory's `tokenizer_config.json`, `added` its
/// `added_tokens.json`: what was added behind the vocabulary stands there alone.
pub(super) fn read(
    path: &Path,
    config: &Map<String, Value>,
    added: &Map<String, Value>,
) -> Result<Parts, DataError> {
    let place = path.display().to_string();
    let error = |message: String| DataError::Tokenizer { place: place.clone(), message };
    let bytes = files::read(path, "read the tokenizer")?;
    let mut vocabulary = vocabulary(&bytes).map_err(error)?;
    vocabulary.add_bos = config.get("add_bos_token").and_then(Value::as_bool);
    let mut parts = gguf_vocabulary::build(&vocabulary).map_err(|e| match e {
        DataError::Tokenizer { message, .. } => error(message),
        other => other,
    })?;
    for (id, token) in added_behind(vocabulary.tokens.len(), config, added) {
        let name = token.content.clone();
        parts.tokenizer.add_tokens([token]).map_err(|e| error(e.to_string()))?;
        let found = parts.tokenizer.token_to_id(&name);
        if found != Some(id) {
            return Err(error(format!("the added token {name:?} should have id {id}, and gets {found:?}")));
        }
    }
    parts.place = place;
    Ok(parts)
}

/// Tokens behind the first `from`, in the order of their ids.
fn added_behind(
    from: usize,
    config: &Map<String, Value>,
    added: &Map<String, Value>,
) -> Vec<(u32, AddedToken)> {
    let decoder = config.get("added_tokens_decoder").and_then(Value::as_object);
    let described = decoder.into_iter().flatten().filter_map(|(id, token)| {
        let special = token.get("special").and_then(Value::as_bool).unwrap_or(false);
        Some((id.parse().ok()?, AddedToken::from(token.get("content")?.as_str()?, special).normalized(false)))
    });
    let named = added.iter().filter_map(|(name, id)| {
        let token = AddedToken::from(name.clone(), true).normalized(false);
        Some((u32::try_from(id.as_u64()?).ok()?, token))
    });
    let mut tokens: Vec<(u32, AddedToken)> =
        described.chain(named).filter(|(id, _)| *id as usize >= from).collect();
    tokens.sort_by_key(|(id, _)| *id);
    tokens.dedup_by_key(|(id, _)| *id);
    tokens
}

/// The vocabulary of a `ModelProto`.
fn vocabulary(bytes: &[u8]) -> Result<GgufVocabulary, String> {
    let mut vocabulary = GgufVocabulary {
        model: "llama".to_owned(),
        // SentencePiece's own, for what the file leaves out.
        bos: Some(1),
        eos: Some(2),
        unknown: Some(0),
        add_space_prefix: Some(true),
        ..GgufVocabulary::default()
    };
    let (mut model_type, mut problems) = (UNIGRAM, Vec::new());
    for field in Fields(bytes) {
        match field? {
            (1, Field::Bytes(piece)) => {
                let (token, score, kind) = piece_of(piece, vocabulary.tokens.len())?;
                vocabulary.tokens.push(token);
                vocabulary.scores.push(score);
                vocabulary.token_types.push(kind);
            }
            (2, Field::Bytes(trainer)) => {
                for field in Fields(trainer) {
                    let id = |n: u64| u32::try_from(n).ok(); // -1 stands for none
                    match field? {
                        (3, Field::Number(n)) => model_type = n,
                        (40, Field::Number(n)) => vocabulary.unknown = id(n),
                        (41, Field::Number(n)) => vocabulary.bos = id(n),
                        (42, Field::Number(n)) => vocabulary.eos = id(n),
                        (43, Field::Number(n)) => vocabulary.padding = id(n),
                        _ => {}
                    }
                }
            }
            (3, Field::Bytes(normalizer)) => normalize(normalizer, &mut vocabulary, &mut problems)?,
            _ => {}
        }
    }
    if vocabulary.tokens.is_empty() {
        return Err("not a SentencePiece model (it holds no pieces)".to_owned());
    }
    if model_type != BPE {
        problems.push(format!("model_type is {model_type}; supported is {BPE}, byte pair encoding"));
    }
    if problems.is_empty() {
        Ok(vocabulary)
    } else {
        Err(format!("{}. Use a directory with a tokenizer.json instead", problems.join("; ")))
    }
}

/// Spelling, score and type of a piece.
fn piece_of(bytes: &[u8], id: usize) -> Result<(String, f32, i32), String> {
    let (mut token, mut score, mut kind) = (String::new(), 0.0, 1);
    for field in Fields(bytes) {
        match field? {
            (1, Field::Bytes(text)) => {
                token = String::from_utf8(text.to_vec()).map_err(|_| format!("piece {id} is no UTF-8"))?;
            }
            (2, Field::Float(value)) => score = value,
            (3, Field::Number(n)) => kind = i32::try_from(n).unwrap_or(kind),
            _ => {}
        }
    }
    Ok((token, score, kind))
}

/// What a `NormalizerSpec` asks for.
fn normalize(
    bytes: &[u8],
    vocabulary: &mut GgufVocabulary,
    problems: &mut Vec<String>,
) -> Result<(), String> {
    let mut collapses = true; // unless the file says otherwise
    for field in Fields(bytes) {
        match field? {
            (2, Field::Bytes(map)) if !map.is_empty() => {
                problems.push("its normalizer rewrites characters (precompiled_charsmap)".to_owned());
            }
            (3, Field::Number(n)) => vocabulary.add_space_prefix = Some(n != 0),
            (4, Field::Number(n)) => collapses = n != 0,
            (5, Field::Number(0)) => {
                problems.push("it does not spell spaces as ▁ (escape_whitespaces)".to_owned());
            }
            _ => {}
        }
    }
    if collapses {
        problems.push("its normalizer drops spaces (remove_extra_whitespaces)".to_owned());
    }
    Ok(())
}

/// A field's value, as it lies in the file.
enum Field<'a> {
    Number(u64),
    Float(f32),
    Bytes(&'a [u8]),
    Other,
}

/// The fields of a message, with their numbers.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Field<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field.ok_or_else(|| {
            "not a whole SentencePiece model; if it was downloaded, download it again".to_owned()
        }))
    }
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Option<(u64, Field<'a>)> {
        let key = self.number()?;
        let value = match key & 7 {
            0 => Field::Number(self.number()?),
            1 => {
                self.take(8)?;
                Field::Other
            }
            2 => {
                let length = usize::try_from(self.number()?).ok()?;
                Field::Bytes(self.take(length)?)
            }
            5 => Field::Float(f32::from_le_bytes(self.take(4)?.try_into().ok()?)),
            _ => return None,
        };
        Some((key >> 3, value))
    }

    /// Seven bits a byte, the lowest first.
    fn number(&mut self) -> Option<u64> {
        let length = 1 + self.0.iter().take(10).position(|byte| byte & 0x80 == 0)?;
        let bytes = self.take(length)?;
        Some(bytes.iter().rev().fold(0, |n, byte| n << 7 | u64::from(byte & 0x7F)))
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }
}

#[cfg(test)]
mod tests;
