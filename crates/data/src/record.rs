//! Records: what a data file holds, whatever it is kept in and however its fields are called.

mod columnar;
mod container;
mod csv;
mod format;
mod json;
mod pages;
mod question;
mod reader;

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use format::{Columns, RecordFormat};
pub use question::Question;
pub use reader::{Found, RecordReader};

/// How many bad records an error message lists before it only counts.
const LISTED: usize = 20;

/// One instruction with its answer, as in the Alpaca data: one turn of a conversation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct InstructRecord {
    /// What is asked.
    pub instruction: String,
    /// What it is asked about; empty where the record has none.
    pub input: String,
    /// The answer to learn.
    pub output: String,
}

/// Questions and answers that follow each other; an [`InstructRecord`] is one of a single turn.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Conversation {
    /// What is said to the model before anyone speaks.
    pub system: Option<String>,
    /// The turns, in order.
    pub turns: Vec<InstructRecord>,
}

impl From<InstructRecord> for Conversation {
    fn from(record: InstructRecord) -> Self {
        Self { system: None, turns: vec![record] }
    }
}

impl Conversation {
    /// A question that waits for its answer.
    pub fn question(instruction: &str, input: &str) -> Self {
        let (instruction, input) = (instruction.to_owned(), input.to_owned());
        InstructRecord { instruction, input, output: String::new() }.into()
    }

    /// As a record of the format [`RecordFormat::Messages`].
    pub fn to_messages(&self) -> serde_json::Value {
        let message = |role: &str, content: &str| serde_json::json!({"role": role, "content": content});
        let system = self.system.iter().map(|system| message("system", system));
        let turns = self.turns.iter().flat_map(|turn| {
            let asked = if turn.input.is_empty() {
                turn.instruction.clone()
            } else {
                format!("{}\n\n{}", turn.instruction, turn.input)
            };
            [message("user", &asked), message("assistant", &turn.output)]
        });
        serde_json::json!({"messages": system.chain(turns).collect::<Vec<_>>()})
    }
}

/// What one record teaches.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Record {
    /// For a template to render.
    Conversation(Conversation),
    /// Text as it is, without a template.
    Text {
        /// What the model is given; may be empty.
        prompt: String,
        /// What it learns to go on with.
        completion: String,
    },
}

impl From<InstructRecord> for Record {
    fn from(record: InstructRecord) -> Self {
        Self::Conversation(record.into())
    }
}

impl Record {
    /// Whether an answer is empty or white space, which teaches only to stop.
    pub fn has_empty_output(&self) -> bool {
        match self {
            Self::Conversation(conversation) => {
                conversation.turns.iter().any(|turn| turn.output.trim().is_empty())
            }
            Self::Text { completion, .. } => completion.trim().is_empty(),
        }
    }
}

/// Where a record came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The file.
    pub file: Arc<Path>,
    /// 1-based number of the record in its file.
    pub record: usize,
    /// 1-based line, known for JSON Lines and CSV.
    pub line: Option<usize>,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: record {}", self.file.display(), self.record)?;
        match self.line {
            Some(line) => write!(f, " (line {line})"),
            None => Ok(()),
        }
    }
}

/// A record that cannot be used, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordProblem {
    /// Which record.
    pub origin: Origin,
    /// What was expected and what was found.
    pub message: String,
}

impl fmt::Display for RecordProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.origin, self.message)
    }
}

/// The records that cannot be used: the first 20, and how many there are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BadRecords {
    /// The first of them, in file order.
    pub problems: Vec<RecordProblem>,
    /// How many there are.
    pub count: usize,
    /// How many records there were in all, good ones included.
    pub records: usize,
}

impl BadRecords {
    /// Counts one, and keeps it if it is among the first.
    pub fn push(&mut self, problem: RecordProblem) {
        self.count += 1;
        if self.problems.len() < LISTED {
            self.problems.push(problem);
        }
    }
}

impl fmt::Display for BadRecords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} of {} records cannot be used:", self.count, self.records)?;
        for problem in &self.problems {
            writeln!(f, "  {problem}")?;
        }
        if let Some(more @ 1..) = self.count.checked_sub(self.problems.len()) {
            writeln!(f, "  ... and {more} more")?;
        }
        write!(
            f,
            "Correct them, or leave them out with --skip-bad. Fields of other names: data.columns (--column \
             instruction=question); records of another format: data.format (--format)"
        )
    }
}

#[cfg(test)]
mod tests;
