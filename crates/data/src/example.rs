//! From a record to the tokens of a training row, and which of them are labels.

use serde::{Deserialize, Serialize};

use crate::error::DataError;
use crate::record::InstructRecord;
use crate::template::{PromptTemplate, Role};
use crate::tokenizer::{Encoder, TextTokenizer};

/// The tokens of one row.
///
/// `loss_mask[i]` says that token `i` is a label: it is predicted from the tokens before it and its loss counts.
/// Nothing precedes position 0, so it is never a label.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenizedExample {
    /// Token ids, `[tokens]`.
    pub token_ids: Vec<u32>,
    /// Which tokens are labels, `[tokens]`.
    pub loss_mask: Vec<bool>,
}

impl TokenizedExample {
    /// How many tokens are labels.
    pub fn supervised(&self) -> usize {
        self.view().supervised()
    }

    /// The same row, borrowed.
    pub fn view(&self) -> ExampleView<'_> {
        ExampleView { token_ids: &self.token_ids, loss_mask: &self.loss_mask }
    }
}

/// A row borrowed from a dataset; see [`TokenizedExample`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExampleView<'a> {
    /// Token ids, `[tokens]`.
    pub token_ids: &'a [u32],
    /// Which tokens are labels, `[tokens]`.
    pub loss_mask: &'a [bool],
}

impl ExampleView<'_> {
    /// How many tokens there are.
    pub fn tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// How many tokens are labels.
    pub fn supervised(&self) -> usize {
        self.loss_mask.iter().filter(|&&label| label).count()
    }

    /// A row of its own.
    pub fn to_example(&self) -> TokenizedExample {
        TokenizedExample { token_ids: self.token_ids.to_vec(), loss_mask: self.loss_mask.to_vec() }
    }
}

impl<'a> From<&'a TokenizedExample> for ExampleView<'a> {
    fn from(example: &'a TokenizedExample) -> Self {
        example.view()
    }
}

/// Why a row is not trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropReason {
    /// The prompt alone fills `max_seq_len`: no token of the answer is left to learn.
    AnswerCutAway,
    /// Nothing precedes the row's only token, so nothing predicts it.
    NothingToPredict,
}

impl std::fmt::Display for DropReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::AnswerCutAway => "answer cut away by max_seq_len",
            Self::NothingToPredict => "nothing to predict",
        })
    }
}

/// What became of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tokenized {
    /// A row with at least one token of the response among its labels.
    Kept {
        /// The row.
        example: TokenizedExample,
        /// Whether its end was cut off to fit `max_seq_len`; such a row does not end in EOS.
        truncated: bool,
    },
    /// No row.
    Dropped(DropReason),
}

/// Tokenizes one record to at most `max_seq_len` tokens, cutting at the right.
///
/// Prompt and response are tokenized apart, so that a prompt at inference has the very tokens it had in
/// training. BOS comes first if the tokenizer adds one; EOS ends the response and is always learned. The labels
/// are the response's tokens, or with `train_on_inputs` all tokens but the first.
pub fn tokenize(
    record: &InstructRecord,
    template: &PromptTemplate,
    tokenizer: &TextTokenizer,
    max_seq_len: usize,
    train_on_inputs: bool,
) -> Result<Tokenized, DataError> {
    tokenize_with(&mut tokenizer.encoder(), record, template, max_seq_len, train_on_inputs)
}

/// [`tokenize`] for many records in a row.
pub fn tokenize_with(
    encoder: &mut Encoder<'_>,
    record: &InstructRecord,
    template: &PromptTemplate,
    max_seq_len: usize,
    train_on_inputs: bool,
) -> Result<Tokenized, DataError> {
    let tokenizer = encoder.tokenizer();
    let mut token_ids: Vec<u32> = tokenizer.bos().into_iter().collect();
    let mut is_response = vec![false; token_ids.len()];
    for segment in template.render(record)? {
        encoder.encode(&segment.text, &mut token_ids)?;
        is_response.resize(token_ids.len(), segment.role == Role::Response);
    }
    token_ids.push(tokenizer.eos());
    is_response.push(true);

    let truncated = token_ids.len() > max_seq_len;
    token_ids.truncate(max_seq_len);
    is_response.truncate(max_seq_len);
    if !is_response.iter().skip(1).any(|&response| response) {
        let reason = if truncated { DropReason::AnswerCutAway } else { DropReason::NothingToPredict };
        return Ok(Tokenized::Dropped(reason));
    }
    let loss_mask =
        is_response.iter().enumerate().map(|(i, &response)| i > 0 && (response || train_on_inputs)).collect();
    Ok(Tokenized::Kept { example: TokenizedExample { token_ids, loss_mask }, truncated })
}

#[cfg(test)]
mod tests;
