//! What spoils a run and shows in its rows: to be found before the run, not after it.

mod mojibake;
mod near_duplicates;
mod rows;
mod shingles;

use serde::{Deserialize, Serialize};

use crate::error::DataError;
use crate::prepared::PreparedDataset;
use crate::tokenizer::TextTokenizer;

/// How many rows of a finding are shown.
const SHOWN: usize = 5;

/// What is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Check {
    /// Rows without a label, and records that gave no row because nothing in them is predicted.
    NothingToLearn,
    /// Rows that end at `max_seq_len` instead of in EOS, and records whose whole answer lay beyond it.
    AnswersCutAway,
    /// Rows that end elsewhere without an EOS that is learned.
    EosAbsent,
    /// Rows that begin with two BOS tokens.
    DoubleBos,
    /// Answers that hold what the template writes between messages, or a token that ends one.
    TemplateMarkers,
    /// Held-out rows that are nearly a row to train on.
    NearDuplicates,
    /// Answers of nothing, white space, or a word for nothing.
    EmptyOutputs,
    /// Text that was read in the wrong encoding.
    Mojibake,
    /// An answer that many rows give.
    OneAnswer,
}

impl Check {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::NothingToLearn,
        Self::AnswersCutAway,
        Self::EosAbsent,
        Self::DoubleBos,
        Self::TemplateMarkers,
        Self::NearDuplicates,
        Self::EmptyOutputs,
        Self::Mojibake,
        Self::OneAnswer,
    ];

    /// The share of rows up to which it is let pass: a few rows of 52,000 that are cut, or that have a twin, change
    /// no loss; one answer that holds a marker teaches to go on talking.
    pub fn let_pass(self) -> f64 {
        match self {
            Self::AnswersCutAway | Self::NearDuplicates => 0.01,
            Self::Mojibake => 0.001,
            _ => 0.0,
        }
    }

    /// What it does to a run, and what to do.
    pub fn advice(self) -> &'static str {
        match self {
            Self::NothingToLearn => "nothing of these is learned; leave them out, or give them an answer",
            Self::AnswersCutAway => {
                "what is cut off is not learned, nor that an answer ends; raise max_seq_len, or shorten the records"
            }
            Self::EosAbsent => {
                "without it a model never learns to stop; mind what the template writes behind an answer, and \
                 which token the tokenizer calls EOS"
            }
            Self::DoubleBos => {
                "the template writes a token that the tokenizer adds; take it out of the template, or of add_bos_token"
            }
            Self::TemplateMarkers => {
                "a model learns from them to go on with the other's part; cut these answers where they begin"
            }
            Self::NearDuplicates => {
                "the eval loss is too good by them; leave one of each pair out of the data, or hold out other rows"
            }
            Self::EmptyOutputs => "they teach to say nothing; leave these records out",
            Self::Mojibake => "the file was read in a wrong encoding once; repair it, for instance with ftfy",
            Self::OneAnswer => {
                "a model learns to give it whatever is asked; leave most of them out, unless the task has few answers"
            }
        }
    }
}

impl std::fmt::Display for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.serialize(f)
    }
}

/// One row that a check found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// Its number, as `--row` counts; `None` for a record that gave no row.
    pub row: Option<usize>,
    /// What was found there.
    pub what: String,
}

/// What a check found.
#[derive(Debug, Clone, PartialEq)]
pub struct Finding {
    /// What was looked for.
    pub check: Check,
    /// How many rows, or records that gave none, have it.
    pub count: usize,
    /// Of how many.
    pub of: usize,
    /// The first of them.
    pub shown: Vec<Shown>,
}

impl Finding {
    fn none(check: Check, of: usize) -> Self {
        Self { check, count: 0, of, shown: Vec::new() }
    }

    fn add(&mut self, row: Option<usize>, what: impl FnOnce() -> String) {
        self.count += 1;
        if self.shown.len() < SHOWN {
            self.shown.push(Shown { row, what: what() });
        }
    }

    /// The share of rows that have it.
    pub fn share(&self) -> f64 {
        self.count as f64 / self.of.max(1) as f64
    }

    /// Whether these are more than are let pass.
    pub fn fails(&self) -> bool {
        self.share() > self.check.let_pass()
    }
}

/// Looks for everything in [`Check::ALL`], in that order. `tokenizer` is the one that the rows were prepared with.
pub fn check(data: &PreparedDataset, tokenizer: &TextTokenizer) -> Result<Vec<Finding>, DataError> {
    let mut findings = rows::findings(data, tokenizer)?;
    findings.push(near_duplicates::finding(data, tokenizer)?);
    findings.sort_by_key(|finding| finding.check);
    Ok(findings)
}

/// The beginning of a text, on one line.
fn excerpt(text: &str) -> String {
    let line: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut shown: String = line.chars().take(60).collect();
    if shown.len() < line.len() {
        shown.push_str("..");
    }
    format!("{shown:?}")
}

#[cfg(test)]
mod tests;
