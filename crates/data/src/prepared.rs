//! The prepared dataset: flat rows and what is known about them.

pub(crate) mod file;

use crate::example::{ExampleView, TokenizedExample};
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

/// Many rows in three vectors instead of two for each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rows {
    /// All rows' token ids, `[tokens]`.
    token_ids: Vec<u32>,
    /// All rows' label marks, `[tokens]`.
    loss_mask: Vec<bool>,
    /// Row `i` is `offsets[i]..offsets[i + 1]`, `[rows + 1]`; begins with 0.
    offsets: Vec<usize>,
}

impl Default for Rows {
    fn default() -> Self {
        Self { token_ids: Vec::new(), loss_mask: Vec::new(), offsets: vec![0] }
    }
}

impl Rows {
    /// From columns that fit each other.
    pub(crate) fn from_columns(token_ids: Vec<u32>, loss_mask: Vec<bool>, offsets: Vec<usize>) -> Self {
        Self { token_ids, loss_mask, offsets }
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
        let range = *self.offsets.get(index)?..*self.offsets.get(index.checked_add(1)?)?;
        Some(ExampleView {
            token_ids: self.token_ids.get(range.clone())?,
            loss_mask: self.loss_mask.get(range)?,
        })
    }

    /// All rows, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = ExampleView<'_>> + '_ {
        self.offsets.windows(2).map(|ends| {
            let range = ends.first().copied().unwrap_or(0)..ends.last().copied().unwrap_or(0);
            ExampleView {
                token_ids: self.token_ids.get(range.clone()).unwrap_or_default(),
                loss_mask: self.loss_mask.get(range).unwrap_or_default(),
            }
        })
    }

    /// Adds a row at the end.
    pub(crate) fn push(&mut self, row: ExampleView<'_>) {
        self.token_ids.extend_from_slice(row.token_ids);
        self.loss_mask.extend_from_slice(row.loss_mask);
        self.offsets.push(self.token_ids.len());
    }
}

impl<'a> FromIterator<&'a TokenizedExample> for Rows {
    fn from_iter<I: IntoIterator<Item = &'a TokenizedExample>>(examples: I) -> Self {
        let mut rows = Self::default();
        for example in examples {
            rows.push(example.view());
        }
        rows
    }
}

#[cfg(test)]
mod tests;
