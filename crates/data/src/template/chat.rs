//! A conversation rendered by a chat template, and cut where the speaker changes.

use std::ops::Range;

use minijinja::{Value, context};

use super::python::{CLOSE, OPEN};
use super::{PromptTemplate, Role, Segment};
use crate::error::DataError;
use crate::example::Learn;
use crate::record::Conversation;

/// A rendered conversation.
struct Filled {
    text: String,
    /// What its `{% generation %}` blocks wrote, in bytes.
    generated: Vec<Range<usize>>,
}

impl PromptTemplate {
    /// The whole conversation, its answers told from the rest.
    pub(super) fn chat_segments(
        &self,
        conversation: &Conversation,
        learn: Learn,
    ) -> Result<Vec<Segment>, DataError> {
        let messages = messages(conversation);
        let whole = self.fill_chat(&messages, false)?;
        let needed = if learn == Learn::All { 0 } else { messages.len().saturating_sub(1) };
        self.cut(&messages, &whole, needed)
    }

    /// The conversation up to where its last answer belongs.
    pub(super) fn chat_prompt(&self, conversation: &Conversation) -> Result<Vec<Segment>, DataError> {
        let mut messages = messages(conversation);
        messages.pop(); // the last turn's answer
        let whole = self.fill_chat(&messages, true)?;
        self.cut(&messages, &whole, messages.len())
    }

    /// Cuts `whole`, the rendering of `messages`. Where the template marks what the model says
    /// (`{% generation %}`), its word counts; else an answer is what the template adds to the conversation up to
    /// there, as it renders it to be answered. Answers before message `needed` may stay where they are not found.
    fn cut(&self, messages: &[Value], whole: &Filled, needed: usize) -> Result<Vec<Segment>, DataError> {
        let answers = if whole.generated.is_empty() {
            self.answers(messages, &whole.text, needed)?
        } else {
            whole.generated.clone()
        };
        let mut segments = Vec::with_capacity(2 * answers.len() + 1);
        let mut at = 0;
        let piece = |range: Range<usize>| whole.text.get(range).unwrap_or_default().to_owned();
        for Range { start, end } in answers {
            segments.push(Segment { role: Role::Prompt, text: piece(at..start) });
            segments.push(Segment { role: Role::Response, text: piece(start..end) });
            at = end;
        }
        if at < whole.text.len() {
            segments.push(Segment { role: Role::Prompt, text: piece(at..whole.text.len()) });
        }
        Ok(segments)
    }

    /// Where each answer stands in `whole`.
    fn answers(
        &self,
        messages: &[Value],
        whole: &str,
        needed: usize,
    ) -> Result<Vec<Range<usize>>, DataError> {
        let mut starts: Vec<(usize, usize)> = Vec::new();
        for (number, _) in messages.iter().enumerate().filter(|(_, message)| is_answer(message)) {
            let prompt = self.fill_chat(messages.get(..number).unwrap_or_default(), true)?.text;
            if whole.starts_with(&prompt) {
                starts.push((number, prompt.len()));
            } else if number >= needed {
                return Err(self.no_beginning(number, &prompt, whole));
            }
        }
        let mut found = Vec::new();
        for (at, &(number, start)) in starts.iter().enumerate() {
            let next = starts.get(at + 1).map_or(whole.len(), |(_, next)| *next);
            let last = number + 1 == messages.len();
            let through = messages.get(..=number).unwrap_or_default();
            let end = if last { Some(whole.len()) } else { self.answer_end(through, whole, start..next)? };
            match end {
                Some(end) => found.push(start..end),
                None if number < needed => {}
                None => return Err(self.no_end(number)),
            }
        }
        Ok(found)
    }

    /// The end of the last answer of `through`, which begins where `within` begins, in `whole`, which goes on
    /// behind it.
    fn answer_end(
        &self,
        through: &[Value],
        whole: &str,
        within: Range<usize>,
    ) -> Result<Option<usize>, DataError> {
        let alone = self.fill_chat(through, false)?.text;
        if within.contains(&alone.len()) && whole.starts_with(&alone) {
            return Ok(Some(alone.len()));
        }
        // Some templates treat the last answer of all differently. Then the token that ends a text ends the answer.
        let rest = whole.get(within.clone()).unwrap_or_default();
        let ends =
            self.eos.iter().filter_map(|eos| Some(within.start + rest.find(eos.as_str())? + eos.len()));
        Ok(ends.min())
    }

    fn no_end(&self, number: usize) -> DataError {
        self.error(&format!(
            "writes answers that others follow differently from last ones, and no end-of-text token after message {}, \
             so that it cannot be told where that answer ends; learn the last answers alone (learn = \"last\"), mark \
             answers with {{% generation %}}, or take another template",
            number + 1
        ))
    }

    fn no_beginning(&self, number: usize, prompt: &str, whole: &str) -> DataError {
        let same = prompt.chars().zip(whole.chars()).take_while(|(a, b)| a == b).count();
        let there = |text: &str| text.chars().skip(same.saturating_sub(8)).take(24).collect::<String>();
        self.error(&format!(
            "renders the first {number} messages, when they are to be answered, otherwise than it begins the whole \
             conversation, so that no prompt could be what the model learned from: {:?} against {:?}. Learn \
             the last answers alone (learn = \"last\"), mark answers with {{% generation %}}, or take another template",
            there(prompt),
            there(whole)
        ))
    }

    /// The template's text for `messages`.
    fn fill_chat(&self, messages: &[Value], add_generation_prompt: bool) -> Result<Filled, DataError> {
        let text = self.fill(context! {
            messages, add_generation_prompt, tools => (), documents => (), ..self.special.clone()
        })?;
        if !text.contains(OPEN) && !text.contains(CLOSE) {
            return Ok(Filled { text, generated: Vec::new() });
        }
        self.without_marks(&text, messages)
    }

    /// Takes the marks of `{% generation %}` blocks out, and remembers where they were.
    fn without_marks(&self, marked: &str, messages: &[Value]) -> Result<Filled, DataError> {
        let mut filled = Filled { text: String::with_capacity(marked.len()), generated: Vec::new() };
        let mut start = None;
        for character in marked.chars() {
            match (character, start) {
                (OPEN, None) => start = Some(filled.text.len()),
                (CLOSE, Some(from)) => {
                    filled.generated.push(from..filled.text.len());
                    start = None;
                }
                (OPEN, Some(_)) | (CLOSE, None) => {
                    return Err(self.error(&format!(
                        "its generation blocks lie within each other, or one of the {} messages holds U+F8F0 or \
                         U+F8F1, which mark them here",
                        messages.len()
                    )));
                }
                (other, _) => filled.text.push(other),
            }
        }
        Ok(filled)
    }
}

fn is_answer(message: &Value) -> bool {
    message.get_attr("role").is_ok_and(|role| role.as_str() == Some("assistant"))
}

/// The conversation as transformers passes it to a template. Beside `content` a question has its `instruction` and
/// `input` where both are there: built-in templates write them apart.
fn messages(conversation: &Conversation) -> Vec<Value> {
    let message = |role: &str, content: &str| {
        Value::from_pairs([("role", Value::from(role)), ("content", Value::from(content))])
    };
    let mut messages = Vec::with_capacity(2 * conversation.turns.len() + 1);
    messages.extend(conversation.system.iter().map(|system| message("system", system)));
    for turn in &conversation.turns {
        messages.push(if turn.input.is_empty() {
            message("user", &turn.instruction)
        } else {
            Value::from_pairs([
                ("role", Value::from("user")),
                ("content", Value::from(format!("{}\n\n{}", turn.instruction, turn.input))),
                ("instruction", Value::from(turn.instruction.as_str())),
                ("input", Value::from(turn.input.as_str())),
            ])
        });
        messages.push(message("assistant", &turn.output));
    }
    messages
}
