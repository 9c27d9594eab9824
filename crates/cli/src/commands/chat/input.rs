//! The user's lines: edited on a terminal, read as they are elsewhere.

use std::io::{self, BufRead, IsTerminal};

use miette::{IntoDiagnostic, Result, WrapErr};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

pub enum Input {
    /// With the lines before it, on the arrow keys.
    Terminal(Box<DefaultEditor>),
    Plain(io::Lines<io::StdinLock<'static>>),
}

impl Input {
    pub fn open() -> Result<Self> {
        if io::stdin().is_terminal() {
            Ok(Self::Terminal(Box::new(DefaultEditor::new().into_diagnostic()?)))
        } else {
            Ok(Self::Plain(io::stdin().lock().lines()))
        }
    }

    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal(_))
    }

    /// The next line; nothing at the end. On a terminal `prompt` stands in front of it.
    pub fn line(&mut self, prompt: &str) -> Result<Option<String>> {
        match self {
            Self::Plain(lines) => lines.next().transpose().into_diagnostic().wrap_err("standard input"),
            Self::Terminal(editor) => match editor.readline(prompt) {
                Ok(line) => {
                    let _ = editor.add_history_entry(&line); // in memory: cannot fail but for its own limits
                    Ok(Some(line))
                }
                Err(ReadlineError::Eof) => Ok(None),
                // Ctrl-C takes back what was typed.
                Err(ReadlineError::Interrupted) => Ok(Some(String::new())),
                Err(error) => Err(error).into_diagnostic(),
            },
        }
    }
}
