//! A template over `instruction`, `input` and `output`: one turn.
//!
//! The response is found by rendering twice, once with the answer and once with a marker in its place that occurs
//! nowhere else: what precedes the marker is the prompt. Nothing is ever searched for "### Response:", which an
//! instruction may well contain.

use minijinja::context;

use super::{PromptTemplate, Role, Segment};
use crate::error::DataError;
use crate::record::{Conversation, InstructRecord};

impl PromptTemplate {
    /// The prompt, then the response. Text that the template has after the output belongs to the response.
    pub(super) fn record_segments(&self, conversation: &Conversation) -> Result<Vec<Segment>, DataError> {
        let record = self.only_turn(conversation)?;
        let (prompt, after) = self.around_output(record)?;
        let mut whole = self.fill_record(record, &record.output)?;
        // The template may filter the output (`{{ output | trim }}`), but its other text may not depend on it.
        if !whole.starts_with(&prompt) || !whole.ends_with(&after) || whole.len() < prompt.len() + after.len()
        {
            return Err(self.error(
                "the text around {{ output }} changes with the output, so that no prompt could be asked without \
                 knowing the answer; let it depend on instruction and input alone",
            ));
        }
        let response = whole.split_off(prompt.len());
        Ok(vec![
            Segment { role: Role::Prompt, text: prompt },
            Segment { role: Role::Response, text: response },
        ])
    }

    /// The prompt alone, up to where the model speaks.
    pub(super) fn record_prompt(&self, conversation: &Conversation) -> Result<Vec<Segment>, DataError> {
        let (prompt, _) = self.around_output(self.only_turn(conversation)?)?;
        Ok(vec![Segment { role: Role::Prompt, text: prompt }])
    }

    fn only_turn<'a>(&self, conversation: &'a Conversation) -> Result<&'a InstructRecord, DataError> {
        match (&conversation.system, conversation.turns.as_slice()) {
            (None, [turn]) => Ok(turn),
            (system, turns) => {
                let system = if system.is_some() { "a system message and " } else { "" };
                Err(self.error(&format!(
                    "knows instruction, input and output, so one turn; found {system}{} turns. Take a template over \
                     `messages`, such as \"chat\", \"alpaca\" or \"vicuna\"",
                    turns.len()
                )))
            }
        }
    }

    /// What the template writes before and after the output.
    fn around_output(&self, record: &InstructRecord) -> Result<(String, String), DataError> {
        let marker = marker([&record.instruction, &record.input, &self.source]);
        let mut text = self.fill_record(record, &marker)?;
        let mut places = text.match_indices(&marker).map(|(at, _)| at);
        match (places.next(), places.next()) {
            (Some(at), None) => {
                let after = text.split_off(at + marker.len());
                text.truncate(at);
                Ok((text, after))
            }
            (None, _) => Err(self.error(
                "never writes {{ output }}, so that there would be nothing to learn; add it where the answer belongs",
            )),
            (Some(_), Some(_)) => Err(self.error(
                "writes {{ output }} more than once, so that the prompt would give the answer away; keep one",
            )),
        }
    }

    fn fill_record(&self, record: &InstructRecord, output: &str) -> Result<String, DataError> {
        let InstructRecord { instruction, input, .. } = record;
        self.fill(context! { instruction, input, output })
    }
}

/// A string that occurs in none of `texts`. It begins and ends with characters of its own, so that no
/// neighbouring text can complete a second one; and it has no letters or spaces for a filter to change.
fn marker(texts: [&str; 3]) -> String {
    let mut number = 0_u64;
    loop {
        let marker = format!("\u{e000}{number}\u{e001}");
        if !texts.iter().any(|text| text.contains(&marker)) {
            return marker;
        }
        number += 1;
    }
}
