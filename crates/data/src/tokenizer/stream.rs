//! Showing a text while it is generated, one token at a time.

use super::TextTokenizer;
use crate::error::DataError;

/// A character takes at most four bytes, and a token at least one: what is still undecided after that many
/// tokens is no character cut in two but rubbish, and is shown as such.
const LONGEST_CHARACTER: usize = 4;

/// Turns token ids into text as they come. A character spread over several tokens is held back until it is
/// whole, so that every piece is proper UTF-8 and all pieces together are the text of all ids.
#[derive(Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a TextTokenizer,
    /// A window on the ids: first those shown last, then those held back.
    ids: Vec<u32>,
    /// How many of `ids` have been shown. They are decoded again each time, since some tokenizers decode a token
    /// differently at the front of a text.
    shown: usize,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a TextTokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), shown: 0 }
    }

    /// Takes one more token; gives the text that is certain by now, which may be empty. Special tokens have none.
    pub fn step(&mut self, id: u32) -> Result<String, DataError> {
        self.ids.push(id);
        self.advance(false)
    }

    /// The text still held back, for the end of generation.
    pub fn finish(mut self) -> Result<String, DataError> {
        self.advance(true)
    }

    fn advance(&mut self, all: bool) -> Result<String, DataError> {
        let (shown, held_back) = self.ids.split_at(self.shown.min(self.ids.len()));
        let before = self.tokenizer.decode(shown)?;
        let after = self.tokenizer.decode(&self.ids)?;
        let undecided = after.ends_with('\u{fffd}') && held_back.len() < LONGEST_CHARACTER;
        if undecided && !all {
            return Ok(String::new());
        }
        if after.len() <= before.len() {
            // Special tokens and such: nothing to show, but nothing held back either.
            self.shown = self.ids.len();
            return Ok(String::new());
        }
        let text =
            after.strip_prefix(&before).or_else(|| after.get(before.len()..)).unwrap_or(&after).to_owned();
        self.ids.drain(..self.shown);
        self.shown = self.ids.len();
        Ok(text)
    }
}
