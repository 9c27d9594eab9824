//! What the fields of a record mean.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Conversation, InstructRecord, Record};

/// How a record says what it says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RecordFormat {
    /// Whatever the first records look like.
    #[default]
    Auto,
    /// `instruction`, `input`, `output`, and perhaps `system`.
    Alpaca,
    /// `conversations`, each with `from` and `value`.
    #[serde(rename = "sharegpt")]
    ShareGpt,
    /// `messages`, each with `role` and `content`.
    Messages,
    /// `prompt` and `completion`, text without a template.
    PromptCompletion,
    /// `text`, all of it learned.
    Text,
}

impl std::fmt::Display for RecordFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Alpaca => "Alpaca",
            Self::ShareGpt => "ShareGPT",
            Self::Messages => "messages",
            Self::PromptCompletion => "prompt and completion",
            Self::Text => "text",
        })
    }
}

/// What the fields are called in this data; each by its usual name where nothing is said.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs)] // each is the field of that name
pub struct Columns {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instruction: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub conversations: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub messages: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

/// The formats that are told apart by their fields; of two that fit, the first.
const KNOWN: [RecordFormat; 5] = [
    RecordFormat::Messages,
    RecordFormat::ShareGpt,
    RecordFormat::Alpaca,
    RecordFormat::PromptCompletion,
    RecordFormat::Text,
];

impl RecordFormat {
    /// The format of records whose first ones are `first`: the one that fits most of them.
    #[allow(clippy::needless_pass_by_value)] // an iterator, cloned for every pass
    pub(super) fn of<'a>(first: impl Iterator<Item = &'a Value> + Clone, columns: &Columns) -> Self {
        let fits = |format: &Self| first.clone().filter(|value| format.fits(value, columns)).count();
        // `max_by_key` takes the last of equals.
        KNOWN.into_iter().rev().max_by_key(fits).filter(|best| fits(best) > 0).unwrap_or(Self::Alpaca)
    }

    /// Whether a table with these columns can hold such records.
    pub(super) fn of_columns(names: &[String], columns: &Columns) -> Option<Self> {
        let has = |field: &&str| names.iter().any(|name| name == columns.name(field));
        KNOWN.into_iter().find(|format| format.required().iter().all(&has))
    }

    fn fits(self, value: &Value, columns: &Columns) -> bool {
        let Value::Object(fields) = value else { return false };
        self.required().iter().all(|field| fields.contains_key(columns.name(field)))
    }

    /// The fields that a record of this format has.
    fn required(self) -> &'static [&'static str] {
        match self {
            Self::Auto | Self::Alpaca => &["instruction", "output"],
            Self::ShareGpt => &["conversations"],
            Self::Messages => &["messages"],
            Self::PromptCompletion => &["prompt", "completion"],
            Self::Text => &["text"],
        }
    }

    /// The record, and the names of fields that are of no use; or everything that is wrong with it.
    pub(super) fn parse(self, value: Value, columns: &Columns) -> Result<(Record, Vec<String>), String> {
        let expected: Vec<&str> = self.required().iter().map(|field| columns.name(field)).collect();
        let Value::Object(fields) = value else {
            return Err(format!(
                "expected an object with {}, found {}",
                expected.join(" and "),
                kind(&value)
            ));
        };
        let mut fields = Fields { left: fields, columns, wrong: Vec::new() };
        let record = match self {
            Self::Auto | Self::Alpaca => Some(fields.alpaca()),
            Self::ShareGpt => fields.dialogue("conversations"),
            Self::Messages => fields.dialogue("messages"),
            Self::PromptCompletion => fields.prompt_completion(),
            Self::Text => Some(Record::Text { prompt: String::new(), completion: fields.text("text") }),
        };
        let others: Vec<String> = fields.left.into_iter().map(|(name, _)| name).collect();
        match record {
            Some(record) if fields.wrong.is_empty() => Ok((record, others)),
            _ if fields.wrong.iter().all(|wrong| wrong.ends_with("is missing")) && !others.is_empty() => {
                Err(format!("{}; there are: {}", fields.wrong.join("; "), others.join(", ")))
            }
            _ => Err(fields.wrong.join("; ")),
        }
    }
}

impl Columns {
    /// What `field` is called.
    fn name<'a>(&'a self, field: &'a str) -> &'a str {
        let renamed = match field {
            "instruction" => &self.instruction,
            "input" => &self.input,
            "output" => &self.output,
            "system" => &self.system,
            "conversations" => &self.conversations,
            "messages" => &self.messages,
            "prompt" => &self.prompt,
            "completion" => &self.completion,
            "text" => &self.text,
            _ => &None,
        };
        renamed.as_deref().unwrap_or(field)
    }
}

/// An object that is taken apart; what is left at the end was of no use.
struct Fields<'a> {
    left: Map<String, Value>,
    columns: &'a Columns,
    wrong: Vec<String>,
}

impl Fields<'_> {
    fn take(&mut self, field: &str) -> (String, Option<Value>) {
        let name = self.columns.name(field).to_owned();
        // Not `remove`, which would move the last field to this place.
        let value = self.left.shift_remove(&name);
        (name, value)
    }

    /// A field that has to be there.
    fn text(&mut self, field: &str) -> String {
        let (name, value) = self.take(field);
        match value {
            Some(Value::String(text)) => return text,
            None => self.wrong.push(format!("`{name}` is missing")),
            Some(other) => self.wrong.push(format!("`{name}` is {}, expected a string", kind(&other))),
        }
        String::new()
    }

    /// A field that may be left out, or null.
    fn optional(&mut self, field: &str) -> String {
        let (name, value) = self.take(field);
        match value {
            Some(Value::String(text)) => return text,
            None | Some(Value::Null) => {}
            Some(other) => self.wrong.push(format!("`{name}` is {}, expected a string", kind(&other))),
        }
        String::new()
    }

    fn alpaca(&mut self) -> Record {
        let turn = InstructRecord {
            instruction: self.text("instruction"),
            input: self.optional("input"),
            output: self.text("output"),
        };
        let system = Some(self.optional("system")).filter(|system| !system.is_empty());
        Record::Conversation(Conversation { system, turns: vec![turn] })
    }

    fn dialogue(&mut self, field: &str) -> Option<Record> {
        let (name, value) = self.take(field);
        let messages = match value {
            Some(Value::Array(messages)) => messages,
            None => {
                self.wrong.push(format!("`{name}` is missing"));
                return None;
            }
            Some(other) => {
                self.wrong.push(format!("`{name}` is {}, expected a list of messages", kind(&other)));
                return None;
            }
        };
        let mut found = conversation(messages, &name);
        let system = self.optional("system");
        if let Ok(conversation) = &mut found
            && conversation.system.is_none()
            && !system.is_empty()
        {
            conversation.system = Some(system);
        }
        found.map(Record::Conversation).map_err(|wrong| self.wrong.push(wrong)).ok()
    }

    /// Text as it is; or where both are lists of messages, one conversation.
    fn prompt_completion(&mut self) -> Option<Record> {
        let name = |field: &str| self.columns.name(field).to_owned();
        let (prompt, completion) = (name("prompt"), name("completion"));
        let is_list = |name: &str| self.left.get(name).is_some_and(Value::is_array);
        if is_list(&prompt) && is_list(&completion) {
            let mut messages = Vec::new();
            for name in [&prompt, &completion] {
                if let Some(Value::Array(part)) = self.left.shift_remove(name) {
                    messages.extend(part);
                }
            }
            let found = conversation(messages, &format!("{prompt}` and `{completion}"));
            return found.map(Record::Conversation).map_err(|wrong| self.wrong.push(wrong)).ok();
        }
        Some(Record::Text { prompt: self.text("prompt"), completion: self.text("completion") })
    }
}

/// Who wrote a message.
#[derive(Clone, Copy, PartialEq)]
enum Author {
    System,
    User,
    Assistant,
}

/// Messages as a conversation. A last question without an answer teaches nothing and is left off.
fn conversation(messages: Vec<Value>, field: &str) -> Result<Conversation, String> {
    let (found, _) = dialogue(messages, field)?;
    if found.turns.is_empty() {
        return Err(format!("`{field}` has no answered question, so that there is nothing to learn"));
    }
    Ok(found)
}

/// Messages as a conversation, perhaps a system message, then user and assistant in turn; and a last question that
/// has no answer.
pub(super) fn dialogue(messages: Vec<Value>, field: &str) -> Result<(Conversation, Option<String>), String> {
    let mut found = Conversation::default();
    let mut question: Option<String> = None;
    for (number, message) in (1..).zip(messages) {
        let place = format!("message {number} of `{field}`");
        let (author, content) = message_parts(message).map_err(|wrong| format!("{place} {wrong}"))?;
        match author {
            Author::System if number == 1 => found.system = Some(content),
            Author::System => {
                return Err(format!("{place} is the system's, expected there only as the first"));
            }
            Author::User if question.is_some() => {
                return Err(format!("{place} is the user's, as the one before it; expected the assistant's"));
            }
            Author::User => question = Some(content),
            Author::Assistant => match question.take() {
                Some(instruction) => {
                    found.turns.push(InstructRecord { instruction, input: String::new(), output: content });
                }
                None => return Err(format!("{place} is the assistant's, expected the user's")),
            },
        }
    }
    Ok((found, question))
}

/// Author and text of a message, by the names of either convention.
fn message_parts(mut message: Value) -> Result<(Author, String), String> {
    let Value::Object(fields) = &mut message else {
        return Err(format!("is {}, expected an object", kind(&message)));
    };
    let author = match fields.get("role").or_else(|| fields.get("from")) {
        None => return Err("has neither `role` nor `from`".to_owned()),
        Some(Value::String(role)) => match role.as_str() {
            "system" | "developer" => Author::System,
            "user" | "human" => Author::User,
            "assistant" | "gpt" | "model" | "bot" | "chatgpt" => Author::Assistant,
            other => return Err(format!("has the role {other:?}, expected system, user or assistant")),
        },
        Some(other) => return Err(format!("has {} as its role, expected a string", kind(other))),
    };
    let content = ["content", "value"].into_iter().find_map(|name| fields.remove(name));
    match content {
        None => Err("has neither `content` nor `value`".to_owned()),
        Some(Value::String(text)) => Ok((author, text)),
        Some(Value::Array(parts)) => {
            let texts: Option<String> = parts.iter().map(|part| part.get("text")?.as_str()).collect();
            texts.map(|text| (author, text)).ok_or_else(|| "has a part that is no text".to_owned())
        }
        Some(other) => Err(format!("has {} as its content, expected a string", kind(&other))),
    }
}

/// What a JSON value is, in words.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
