//! Many texts to token ids, faster.

use std::collections::HashMap;

use tokenizers::{Model, OffsetReferential, OffsetType, PreTokenizer};

use super::{TextTokenizer, growth};
use crate::error::DataError;
use crate::guarded::guarded;

/// How many words one encoder remembers. Alpaca's 52,000 records have some 60,000 distinct ones.
const WORDS: usize = 1 << 17;
/// Longer words are hardly ever met again. In bytes.
const LONGEST_WORD: usize = 64;
/// Letters that an error shows of a text.
const SHOWN: usize = 40;

/// Gives the same ids as the tokenizers crate, at about three quarters of the cost: it walks the tokenizer's stages itself,
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
        // On this thread: there are regular expressions in a tokenizer, whose reader panics where a text takes them too
        // long.
        guarded(|| self.walk(text, ids)).flatten().map_err(|why| {
            let (beginning, bytes) = (text.chars().take(SHOWN).collect::<String>(), text.len());
            let more = if beginning.len() < bytes { ".." } else { "" };
            let action = format!("encode {beginning:?}{more} ({bytes} bytes)");
            self.tokenizer.error(&action, &format!("{why}; leave this text out, or take another tokenizer"))
        })
    }

    fn walk(&mut self, text: &str, ids: &mut Vec<u32>) -> Result<(), String> {
        let tokenizer = &self.tokenizer.tokenizer;
        let failed = |error: tokenizers::Error| error.to_string();
        // Added tokens are taken out whole, what is between them is normalized ..
        let mut pieces = growth::normalized(tokenizer, text)?;
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
