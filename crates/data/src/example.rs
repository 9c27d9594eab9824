//! From a record to the tokens of a training row, and which of them are labels.

use serde::{Deserialize, Serialize};

use crate::error::DataError;
use crate::record::{Conversation, Record};
use crate::template::{PromptTemplate, Role, Segment};
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
        let Self { token_ids, loss_mask } = self;
        ExampleView { token_ids, loss_mask, answers: loss_mask }
    }
}

/// A row borrowed from a dataset; see [`TokenizedExample`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExampleView<'a> {
    /// Token ids, `[tokens]`.
    pub token_ids: &'a [u32],
    /// Which tokens are labels, `[tokens]`.
    pub loss_mask: &'a [bool],
    /// Which of the labels are an answer's, `[tokens]`: all of them, unless the prompt is learned too.
    pub answers: &'a [bool],
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

    /// What a prepared file says of each token: see [`mark`].
    pub(crate) fn marks(&self) -> impl Iterator<Item = u8> + '_ {
        self.loss_mask.iter().zip(self.answers).map(|(&label, &answer)| mark(label, answer))
    }

    /// A row of its own.
    pub fn to_example(&self) -> TokenizedExample {
        TokenizedExample { token_ids: self.token_ids.to_vec(), loss_mask: self.loss_mask.to_vec() }
    }
}

/// The mark of a label that is no answer's.
pub(crate) const PROMPT: u8 = 2;
/// The mark of an answer's label.
pub(crate) const ANSWER: u8 = 1;

/// A token in a prepared file: no label, an answer's, or a prompt's that is learned too.
pub(crate) fn mark(label: bool, answer: bool) -> u8 {
    match (label, answer) {
        (false, _) => 0,
        (true, true) => ANSWER,
        (true, false) => PROMPT,
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

/// Which answers of a conversation are learned.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Learn {
    /// Every one.
    #[default]
    All,
    /// The last alone; those before it are given.
    Last,
}

/// How a record becomes a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowConfig {
    /// The longest row, in tokens; at least 2. Longer ones are cut at the right.
    pub max_seq_len: usize,
    /// Whether the prompt is learned too.
    pub train_on_inputs: bool,
    /// Which answers are.
    pub learn: Learn,
}

/// What became of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tokenized {
    /// A row with at least one token of the response among its labels.
    Kept {
        /// The row.
        example: TokenizedExample,
        /// Which of its labels are an answer's, `[tokens]`.
        answers: Vec<bool>,
        /// Whether its end was cut off to fit `max_seq_len`; such a row does not end in EOS.
        truncated: bool,
    },
    /// No row.
    Dropped(DropReason),
}

/// Tokenizes one record, cutting at the right.
///
/// Prompts and responses are tokenized apart, so that a prompt at inference has the very tokens it had in
/// training. The row ends in EOS, which is always learned. The labels are the responses' tokens, or with
/// `train_on_inputs` all tokens but the first.
///
/// A chat template writes the tokens that begin and end texts itself, as in transformers; what it writes behind an
/// answer's last EOS is no part of the answer, and behind the last answer left off. Elsewhere BOS comes first if the
/// tokenizer adds one, and EOS last.
pub fn tokenize(
    encoder: &mut Encoder<'_>,
    record: &Record,
    template: &PromptTemplate,
    config: RowConfig,
) -> Result<Tokenized, DataError> {
    let tokenizer = encoder.tokenizer();
    let RowConfig { max_seq_len, train_on_inputs, learn } = config;
    let mut segments = template.render(record, learn)?;
    let has_own_ends = template.writes_special_tokens() && matches!(record, Record::Conversation(_));
    if learn == Learn::Last {
        let answers = segments.iter_mut().rev().filter(|segment| segment.role == Role::Response);
        answers.skip(1).for_each(|segment| segment.role = Role::Prompt);
    }
    let mut token_ids: Vec<u32> =
        if has_own_ends { Vec::new() } else { tokenizer.bos().into_iter().collect() };
    let mut is_response = vec![false; token_ids.len()];
    let mut last_answer = 0;
    for segment in segments {
        let start = token_ids.len();
        append(encoder, &segment, &mut token_ids)?;
        is_response.resize(token_ids.len(), segment.role == Role::Response);
        if segment.role == Role::Response {
            last_answer = token_ids.len();
            let ids = token_ids.get(start..).unwrap_or_default();
            if has_own_ends && let Some(eos) = ids.iter().rposition(|id| tokenizer.eos_ids().contains(id)) {
                last_answer = start + eos + 1;
                is_response.truncate(last_answer);
                is_response.resize(token_ids.len(), false);
            }
        }
    }
    token_ids.truncate(last_answer);
    is_response.truncate(last_answer);
    if !(has_own_ends && token_ids.last().is_some_and(|id| tokenizer.eos_ids().contains(id))) {
        token_ids.push(tokenizer.eos());
        is_response.push(true);
    }
    Ok(row(token_ids, is_response, max_seq_len, train_on_inputs))
}

/// The tokens of a conversation whose last answer is to come: those that [`tokenize`] gives what precedes it.
pub fn tokenize_prompt(
    tokenizer: &TextTokenizer,
    conversation: &Conversation,
    template: &PromptTemplate,
) -> Result<Vec<u32>, DataError> {
    let own = template.writes_special_tokens();
    let mut ids: Vec<u32> = if own { Vec::new() } else { tokenizer.bos().into_iter().collect() };
    for segment in template.render_prompt(conversation)? {
        append(&mut tokenizer.encoder(), &segment, &mut ids)?;
    }
    Ok(ids)
}

/// The first piece of a text begins as the tokenizer begins texts; the others go on from there.
fn append(encoder: &mut Encoder<'_>, segment: &Segment, ids: &mut Vec<u32>) -> Result<(), DataError> {
    let bos = encoder.tokenizer().bos();
    if ids.iter().all(|&id| Some(id) == bos) {
        encoder.encode(&segment.text, ids)
    } else {
        encoder.encode_next(&segment.text, ids)
    }
}

fn row(
    mut token_ids: Vec<u32>,
    mut is_response: Vec<bool>,
    max_seq_len: usize,
    train_on_inputs: bool,
) -> Tokenized {
    let truncated = token_ids.len() > max_seq_len;
    token_ids.truncate(max_seq_len);
    is_response.truncate(max_seq_len);
    if !is_response.iter().skip(1).any(|&response| response) {
        return Tokenized::Dropped(if truncated {
            DropReason::AnswerCutAway
        } else {
            DropReason::NothingToPredict
        });
    }
    let loss_mask =
        is_response.iter().enumerate().map(|(i, &response)| i > 0 && (response || train_on_inputs)).collect();
    is_response.first_mut().into_iter().for_each(|first| *first = false); // it is no label
    Tokenized::Kept { example: TokenizedExample { token_ids, loss_mask }, answers: is_response, truncated }
}

#[cfg(test)]
mod tests;
