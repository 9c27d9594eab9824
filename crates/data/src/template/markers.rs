//! The lines by which a template says who speaks.

use std::collections::BTreeSet;

use super::PromptTemplate;
use crate::example::Learn;
use crate::record::{Conversation, InstructRecord};
use crate::tokenizer::TextTokenizer;

/// In place of what is said: text that no template has, and none of which is a space that a template would trim.
const SAID: char = '\u{e000}';

/// Shorter ones are punctuation; longer ones are sentences, which may well be said.
const LENGTHS: std::ops::RangeInclusive<usize> = 4..=40;

impl PromptTemplate {
    /// What it writes around messages that no answer should hold, such as `### Response:` or `[INST]`; words without
    /// a mark of their own (`user`) are none, and tokens such as `<|im_start|>` are known by their ids.
    pub fn markers(&self, tokenizer: &TextTokenizer) -> Vec<String> {
        let said = SAID.to_string();
        let turn = InstructRecord { instruction: said.clone(), input: said.clone(), output: said.clone() };
        let with_input = Conversation { system: None, turns: vec![turn.clone()] };
        let twice = Conversation {
            system: None,
            turns: vec![InstructRecord { input: String::new(), ..turn.clone() }; 2],
        };
        let with_system = Conversation { system: Some(said), ..twice.clone() };
        let mut control: Vec<String> = tokenizer.control_tokens().into_values().collect();
        control.sort_by_key(|token| std::cmp::Reverse(token.len()));
        let mut markers = BTreeSet::new();
        // A template that refuses a system message, or a second turn, is asked without.
        for conversation in [with_input, twice, with_system] {
            let Ok(segments) = self.conversation_segments(&conversation, Learn::Last) else { continue };
            let text: String = segments.into_iter().map(|segment| segment.text).collect();
            let text = control.iter().fold(text, |text, token| text.replace(token.as_str(), "\n"));
            let lines = text.split([SAID, '\n']).map(str::trim);
            markers.extend(lines.filter(|line| marks(line)).map(str::to_owned));
        }
        markers.into_iter().collect()
    }
}

fn marks(line: &str) -> bool {
    LENGTHS.contains(&line.chars().count())
        && line.contains(|c: char| "#<>[]{}|:".contains(c))
        && line.contains(char::is_alphabetic)
}
