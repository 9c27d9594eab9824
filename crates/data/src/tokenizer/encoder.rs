//! Many texts to token ids, faster.

use std::collections::HashMap;

use tokenizers::{Model, OffsetReferential, OffsetType, PreTokenizer};

use super::TextTokenizer;
use crate::error::DataError;

/// How many words one encoder remembers. Alpaca's 52,000 records have some 60,000 distinct ones.
const WORDS: usize = 1 << 17;
/// Longer words are hardly ever met again. In bytes.
const LONGEST_WORD: usize = 64;

/// Gives the same ids as [`TextTokenizer::encode`], at about three quarters of the cost: it walks the tokenizer's stages itself,
/// remembers each word's ids, and so never builds the spelling and offsets of every token, which nobody reads.
/// For one thread.
#[derive(Debug)]
pub struct Encoder<'a> {
    tokenizer: &'a TextTokenizer,
    words: HashMap<String, Box<[u32]>>,
}

impl<'a> Encoder<'a> {
    pub(super) fn new(tokenizer: &'a TextTokenizer) -> Self {
        Self { tokenizer, words: HashMap::new() }
    }

    /// The tokenizer it works for.
    pub fn tokenizer(&self) -> &'a TextTokenizer {
        self.tokenizer
    }

    /// Adds the ids of `text`, which goes on from what precedes it, to `ids`: without the space that
    /// `SentencePiece` puts in front of a text.
    pub fn encode_next(&mut self, text: &str, ids: &mut Vec<u32>) -> Result<(), DataError> {
        if !self.tokenizer.adds_space || text.is_empty() {
            return self.encode(text, ids);
        }
        // Behind a byte that no text holds, and that merges with nothing, nothing is put in front.
        let (mut byte, mut both) = (Vec::new(), Vec::new());
        self.encode("\u{1}", &mut byte)?;
        self.encode(&format!("\u{1}{text}"), &mut both)?;
        match both.strip_prefix(byte.as_slice()) {
            Some(rest) => ids.extend_from_slice(rest),
            None => self.encode(text, ids)?,
        }
        Ok(())
    }

    /// Adds the ids of `text` to `ids`, with neither BOS nor EOS.
    pub fn encode(&mut self, text: &str, ids: &mut Vec<u32>) -> Result<(), DataError> {
        let tokenizer = &self.tokenizer.tokenizer;
        let failed = |error| self.tokenizer.error("encode", &error);
        // Added tokens are taken out whole, what is between them is normalized ..
        let added = tokenizer.get_added_vocabulary();
        let mut pieces = added.extract_and_normalize(tokenizer.get_normalizer(), text);
        // .. and cut into words ..
        if let Some(cut) = tokenizer.get_pre_tokenizer() {
            cut.pre_tokenize(&mut pieces).map_err(failed)?;
        }
        // .. each of which the model sees alone.
        for (word, _, added) in pieces.get_splits(OffsetReferential::Normalized, OffsetType::None) {
            if let Some(tokens) = added {
                ids.extend(tokens.iter().map(|token| token.id));
            } else if let Some(known) = self.words.get(word) {
                ids.extend_from_slice(known);
            } else {
                let tokens = tokenizer.get_model().tokenize(word).map_err(failed)?;
                let first = ids.len();
                ids.extend(tokens.iter().map(|token| token.id));
                if word.len() <= LONGEST_WORD && self.words.len() < WORDS {
                    self.words.insert(word.to_owned(), ids.get(first..).unwrap_or_default().into());
                }
            }
        }
        Ok(())
    }
}
