//! The prepared dataset: flat rows and what is known about them.

pub(crate) mod file;

use std::ops::Range;

use crate::example::{ANSWER, ExampleView, PROMPT, TokenizedExample, mark};
use crate::order::Mixture;
use crate::report::PrepareReport;

/// Rows ready to train on, with the key that says from what they were made.
#[derive(Debug, Clone, PartialEq)]
pub struct PreparedDataset {
    /// See [`key`](crate::prepare::key).
    pub key: String,
    /// The rows to train on, in file order.
    pub train: Rows,
    /// The rows held out, in file order.
    pub validation: Rows,
    /// How often which of the rows to train on appear in an epoch.
    pub mixture: Mixture,
    /// What preparing them found.
    pub report: PrepareReport,
    /// The template's name or path.
    pub template: String,
    /// The limit the rows were cut to, in tokens.
    pub max_seq_len: usize,
}

/// Many rows in a few vectors instead of two for each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rows {
    /// All rows' token ids, `[tokens]`.
    token_ids: Vec<u32>,
    /// All rows' label marks, `[tokens]`.
    loss_mask: Vec<bool>,
    /// Which of the labels are an answer's, `[tokens]`; empty where all are, as no prompt is learned.
    answers: Vec<bool>,
    /// Row `i` is `offsets[i]..offsets[i + 1]`, `[rows + 1]`; begins with 0.
    offsets: Vec<usize>,
}

impl Default for Rows {
    fn default() -> Self {
        Self { token_ids: Vec::new(), loss_mask: Vec::new(), answers: Vec::new(), offsets: vec![0] }
    }
}

impl Rows {
    /// From columns that fit each other: token ids, their marks, and where rows begin and end.
    pub(crate) fn from_columns(token_ids: Vec<u32>, marks: &[u8], offsets: Vec<usize>) -> Self {
        let loss_mask = marks.iter().map(|&mark| mark != 0).collect();
        let learned = if marks.contains(&PROMPT) { marks } else { &[] };
        let answers = learned.iter().map(|&mark| mark == ANSWER).collect();
        Self { token_ids, loss_mask, answers, offsets }
    }

    /// The marks of all tokens.
    pub(crate) fn marks(&self) -> impl Iterator<Item = u8> + '_ {
        let answer = |at: usize, label: bool| self.answers.get(at).copied().unwrap_or(label);
        self.loss_mask.iter().enumerate().map(move |(at, &label)| mark(label, answer(at, label)))
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many tokens there are in all rows.
    pub fn tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// How many tokens of all rows are labels.
    pub fn supervised(&self) -> usize {
        self.loss_mask.iter().filter(|&&label| label).count()
    }

    /// The highest token id, to be checked against a model's `vocab_size`; `None` without rows.
    pub fn max_token_id(&self) -> Option<u32> {
        self.token_ids.iter().copied().max()
    }

    /// Row `index`, if there is one.
    pub fn get(&self, index: usize) -> Option<ExampleView<'_>> {
        self.view(*self.offsets.get(index)?..*self.offsets.get(index.checked_add(1)?)?)
    }

    /// The row that lies there.
    fn view(&self, range: Range<usize>) -> Option<ExampleView<'_>> {
        let loss_mask = self.loss_mask.get(range.clone())?;
        let answers = if self.answers.is_empty() { loss_mask } else { self.answers.get(range.clone())? };
        Some(ExampleView { token_ids: self.token_ids.get(range)?, loss_mask, answers })
    }

    /// All rows, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = ExampleView<'_>> + '_ {
        self.offsets.windows(2).map(|ends| {
            let range = ends.first().copied().unwrap_or(0)..ends.last().copied().unwrap_or(0);
            self.view(range).unwrap_or(ExampleView { token_ids: &[], loss_mask: &[], answers: &[] })
        })
    }
}

impl<'a> FromIterator<&'a TokenizedExample> for Rows {
    fn from_iter<I: IntoIterator<Item = &'a TokenizedExample>>(examples: I) -> Self {
        let mut rows = Self::default();
        for example in examples {
            rows.token_ids.extend_from_slice(&example.token_ids);
            rows.loss_mask.extend_from_slice(&example.loss_mask);
            rows.offsets.push(rows.token_ids.len());
        }
        rows
    }
}

#[cfg(test)]
mod tests;
