//! The tokenizer inside a GGUF file, rebuilt as a Hugging Face one.

mod merges;

use std::collections::HashMap;

use serde_json::{Map, Value, json};
use tokenizers::models::bpe::{BPE, BpeBuilder, Vocab};
use tokenizers::normalizers::{NFC, NormalizerWrapper, Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, DecoderWrapper, SplitDelimiterBehavior, Tokenizer, decoders};

use crate::error::DataError;
use crate::tokenizer::Parts;

/// `tokenizer.ggml.token_type` of a piece of text.
pub(crate) const NORMAL: i32 = 1;
/// Of a token that stands for an unknown one.
pub(crate) const UNKNOWN: i32 = 2;
/// Of a token with a meaning instead of a text.
pub(crate) const CONTROL: i32 = 3;
/// Of a token that is always matched whole.
pub(crate) const USER_DEFINED: i32 = 4;
/// Of a token that no text has.
pub(crate) const UNUSED: i32 = 5;
/// Of a byte, for characters without a token of their own.
pub(crate) const BYTE: i32 = 6;

/// How Llama 3 cuts text into words; digits in groups of up to three.
const LLAMA3_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// How Qwen 2 does; each digit for itself.
const QWEN2_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// What a GGUF file says about its tokenizer, under the keys `tokenizer.ggml.*`.
#[derive(Debug, Clone, Default)]
pub struct GgufVocabulary {
    /// `model`: "gpt2" (byte-level BPE) or "llama" (`SentencePiece` BPE).
    pub model: String,
    /// `pre`: how a byte-level BPE cuts text into words.
    pub pre: Option<String>,
    /// `tokens`: the spelling of each token, by id.
    pub tokens: Vec<String>,
    /// `token_type`: of each token; empty if all are normal.
    pub token_types: Vec<i32>,
    /// `merges`: "left right", best first; byte-level BPE only.
    pub merges: Vec<String>,
    /// `scores`: of each token, the higher the sooner it is merged; `SentencePiece` only.
    pub scores: Vec<f32>,
    /// `bos_token_id`.
    pub bos: Option<u32>,
    /// `eos_token_id`.
    pub eos: Option<u32>,
    /// `unknown_token_id`; left out, the first token whose type says so.
    pub unknown: Option<u32>,
    /// `padding_token_id`: nothing here pads, but a saved tokenizer's other readers may.
    pub padding: Option<u32>,
    /// `add_bos_token`.
    pub add_bos: Option<bool>,
    /// `add_space_prefix`.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template` (the one key without `ggml`).
    pub chat_template: Option<String>,
}

/// The ways of cutting text into words that are known by `pre`.
#[derive(Clone, Copy, PartialEq)]
enum Words {
    Gpt2,
    SmolLm,
    Llama3,
    Qwen2,
}

/// The families of vocabularies.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    ByteLevel(Words),
    SentencePiece,
}

fn error(message: String) -> DataError {
    DataError::Tokenizer { place: "of the GGUF file".to_owned(), message }
}

pub(crate) fn build(vocabulary: &GgufVocabulary) -> Result<Parts, DataError> {
    let kind = vocabulary.kind()?;
    let ids = vocabulary.ids()?;
    let mut tokenizer = match kind {
        Kind::ByteLevel(words) => byte_level(vocabulary, &ids, words)?,
        Kind::SentencePiece => sentence_piece(vocabulary, &ids)?,
    };
    // llama.cpp's own defaults, for files that leave these keys out.
    let (bos, eos, add_bos) = match kind {
        Kind::SentencePiece => (vocabulary.bos.or(Some(1)), vocabulary.eos.or(Some(2)), true),
        Kind::ByteLevel(words) => (vocabulary.bos, vocabulary.eos, words == Words::Llama3),
    };
    let bos_name = vocabulary.name("BOS", bos)?;
    let eos_name = vocabulary.name("EOS", eos)?;
    // Tokens of the user are looked for behind the normalizer, where a space is a `▁` already: with a
    // space put in front, they would get one too.
    let normalized = kind == Kind::SentencePiece && vocabulary.add_space_prefix == Some(false);
    let added = vocabulary.added_tokens([bos, eos], normalized);
    tokenizer.add_tokens(added).map_err(|e| error(e.to_string()))?;
    let bos = bos.filter(|_| vocabulary.add_bos.unwrap_or(add_bos));
    if let (Some(id), Some(name)) = (bos, bos_name) {
        // So that whoever loads the saved tokenizer.json gets BOS too.
        tokenizer.with_post_processor(Some(bos_in_front(id, name).map_err(error)?));
    } else if vocabulary.add_bos == Some(true) {
        return Err(error("add_bos_token is true, but bos_token_id is missing".to_owned()));
    }
    let config = vocabulary.config(bos.is_some(), bos_name, eos_name);
    Ok(Parts { tokenizer, place: "of the GGUF file".to_owned(), bos, eos: eos.into_iter().collect(), config })
}

impl GgufVocabulary {
    fn kind(&self) -> Result<Kind, DataError> {
        let words = match (self.model.as_str(), self.pre.as_deref()) {
            ("llama", _) => return Ok(Kind::SentencePiece),
            ("gpt2", None | Some("gpt-2" | "default")) => Words::Gpt2,
            ("gpt2", Some("smollm")) => Words::SmolLm,
            ("gpt2", Some("llama-bpe" | "llama3" | "llama-v3")) => Words::Llama3,
            ("gpt2", Some("qwen2")) => Words::Qwen2,
            ("gpt2", Some(pre)) => {
                return Err(error(format!(
                    "tokenizer.ggml.pre is {pre:?}; supported are smollm, llama-bpe, qwen2, gpt-2 and default. \
                     Use the model's Hugging Face directory instead"
                )));
            }
            (model, _) => {
                return Err(error(format!(
                    "tokenizer.ggml.model is {model:?}; supported are gpt2 (byte-level BPE) and llama \
                     (SentencePiece BPE). Use the model's Hugging Face directory instead"
                )));
            }
        };
        Ok(Kind::ByteLevel(words))
    }

    /// Spelling to id, for a vocabulary whose lists agree with each other.
    fn ids(&self) -> Result<HashMap<&str, u32>, DataError> {
        if self.tokens.is_empty() {
            return Err(error("tokenizer.ggml.tokens is missing or empty".to_owned()));
        }
        for (key, length) in [("token_type", self.token_types.len()), ("scores", self.scores.len())] {
            if length != 0 && length != self.tokens.len() {
                let tokens = self.tokens.len();
                return Err(error(format!("tokenizer.ggml.{key} has {length} entries for {tokens} tokens")));
            }
        }
        let mut ids = HashMap::with_capacity(self.tokens.len());
        for (id, token) in (0..).zip(&self.tokens) {
            if let Some(first) = ids.insert(token.as_str(), id) {
                return Err(error(format!("the tokens {first} and {id} are both spelled {token:?}")));
            }
        }
        Ok(ids)
    }

    fn token_type(&self, id: usize) -> i32 {
        self.token_types.get(id).copied().unwrap_or(NORMAL)
    }

    fn name(&self, what: &str, id: Option<u32>) -> Result<Option<&str>, DataError> {
        let Some(id) = id else { return Ok(None) };
        let token = self.tokens.get(id as usize).map(String::as_str);
        token.map(Some).ok_or_else(|| {
            error(format!(
                "the {what} token id {id} is not in the vocabulary of {} tokens",
                self.tokens.len()
            ))
        })
    }

    /// The tokens that are matched whole, before anything is cut or merged. `always` are special whatever their type.
    fn added_tokens(&self, always: [Option<u32>; 2], normalized: bool) -> Vec<AddedToken> {
        let added = self.tokens.iter().enumerate().filter_map(|(id, token)| {
            let kind = self.token_type(id);
            let special = matches!(kind, UNKNOWN | CONTROL) || always.contains(&Some(id as u32));
            let wanted = (special || kind == USER_DEFINED) && !token.is_empty();
            wanted.then(|| AddedToken::from(token.clone(), special).normalized(normalized && !special))
        });
        added.collect()
    }

    fn config(&self, add_bos: bool, bos: Option<&str>, eos: Option<&str>) -> Map<String, Value> {
        let by_type = || (0..self.tokens.len()).find(|&id| self.token_type(id) == UNKNOWN);
        let unknown = self.unknown.map(|id| id as usize).or_else(by_type);
        let padding = self.padding.map(|id| id as usize);
        let entries = [
            ("tokenizer_class", json!("PreTrainedTokenizerFast")),
            ("add_bos_token", json!(add_bos)),
            ("bos_token", json!(bos)),
            ("eos_token", json!(eos)),
            ("unk_token", json!(unknown.and_then(|id| self.tokens.get(id)))),
            ("pad_token", json!(padding.and_then(|id| self.tokens.get(id)))),
            ("clean_up_tokenization_spaces", json!(false)),
            ("chat_template", json!(self.chat_template)),
        ];
        entries.into_iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.to_owned(), v)).collect()
    }
}

fn bos_in_front(id: u32, name: &str) -> Result<TemplateProcessing, String> {
    TemplateProcessing::builder()
        .try_single(vec![name.to_owned(), "$A".to_owned()])
        .and_then(|builder| builder.try_pair(vec![name.to_owned(), "$A".to_owned(), "$B:1".to_owned()]))?
        .special_tokens(vec![(name.to_owned(), id)])
        .build()
        .map_err(|e| e.to_string())
}

fn bpe(ids: &HashMap<&str, u32>, merges: Vec<(String, String)>) -> BpeBuilder {
    let vocab: Vocab = ids.iter().map(|(token, id)| ((*token).to_owned(), *id)).collect();
    BPE::builder().vocab_and_merges(vocab, merges)
}

/// Byte-level BPE, as in GPT-2, Llama 3 and Qwen: bytes are spelled as printable characters.
fn byte_level(
    vocabulary: &GgufVocabulary,
    ids: &HashMap<&str, u32>,
    words: Words,
) -> Result<Tokenizer, DataError> {
    let merges = merges::listed(vocabulary, ids).map_err(error)?;
    let model = bpe(ids, merges)
        // Llama 3 takes a word that is a token as that token, merges or no merges.
        .ignore_merges(words == Words::Llama3)
        .build()
        .map_err(|e| error(e.to_string()))?;
    let mut tokenizer = Tokenizer::new(model);
    let cut: PreTokenizerWrapper = match words {
        Words::Gpt2 => ByteLevel::new(false, true, true).into(),
        Words::SmolLm => {
            PreTokenizers::new(vec![Digits::new(true).into(), ByteLevel::new(false, true, true).into()])
                .into()
        }
        Words::Llama3 => split(LLAMA3_WORDS)?,
        Words::Qwen2 => split(QWEN2_WORDS)?,
    };
    tokenizer.with_pre_tokenizer(Some(cut));
    if words == Words::Qwen2 {
        tokenizer.with_normalizer(Some(NFC)).map_err(|e| error(e.to_string()))?;
    }
    tokenizer.with_decoder(Some(ByteLevel::new(false, true, true)));
    Ok(tokenizer)
}

fn split(words: &str) -> Result<PreTokenizerWrapper, DataError> {
    let pattern = SplitPattern::Regex(words.to_owned());
    let split =
        Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(|e| error(e.to_string()))?;
    Ok(PreTokenizers::new(vec![split.into(), ByteLevel::new(false, true, false).into()]).into())
}

/// `SentencePiece` BPE, as in Llama 1 and 2: spaces are spelled `▁`, and characters without a token fall back to
/// bytes. The same normalizer and decoder as in Llama 2's own tokenizer.json.
fn sentence_piece(vocabulary: &GgufVocabulary, ids: &HashMap<&str, u32>) -> Result<Tokenizer, DataError> {
    let merges = merges::from_scores(vocabulary, ids).map_err(error)?;
    let mut model = bpe(ids, merges).fuse_unk(true).byte_fallback(true);
    let unknown = (0..vocabulary.tokens.len()).find(|&id| vocabulary.token_type(id) == UNKNOWN);
    if let Some(token) = vocabulary.tokens.get(unknown.unwrap_or_default()) {
        model = model.unk_token(token.clone());
    }
    let mut tokenizer = Tokenizer::new(model.build().map_err(|e| error(e.to_string()))?);
    let prefix = vocabulary.add_space_prefix.unwrap_or(true);
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    if prefix {
        normalizers.push(Prepend::new("▁".to_owned()).into());
    }
    normalizers.push(Replace::new(" ", "▁").map_err(|e| error(e.to_string()))?.into());
    tokenizer.with_normalizer(Some(Normalizers::new(normalizers))).map_err(|e| error(e.to_string()))?;

    let mut decoders: Vec<DecoderWrapper> = vec![
        Replace::new("▁", " ").map_err(|e| error(e.to_string()))?.into(),
        decoders::byte_fallback::ByteFallback::new().into(),
        decoders::fuse::Fuse::new().into(),
    ];
    if prefix {
        decoders.push(decoders::strip::Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(decoders::sequence::Sequence::new(decoders)));
    Ok(tokenizer)
}

#[cfg(test)]
mod tests;
