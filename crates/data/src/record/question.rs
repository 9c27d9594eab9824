//! What is asked of a model: a record whose answer is to come.

use serde_json::{Map, Value};

use super::format::{dialogue, kind};
use super::{Conversation, InstructRecord};

/// A question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Question {
    /// For a template to render; the last turn's output is not looked at.
    Conversation(Conversation),
    /// Text as it is, to be gone on with.
    Text(String),
}

impl Question {
    /// By its fields: `messages` or `conversations`, `instruction` with `input` and `system`, or `prompt`, text or
    /// messages. An answer that is there already is asked for again.
    pub fn parse(mut fields: Map<String, Value>) -> Result<Self, String> {
        for name in ["messages", "conversations", "prompt"] {
            match fields.remove(name) {
                Some(Value::Array(messages)) => {
                    return of_messages(messages, name, optional(&fields, "system")?);
                }
                Some(Value::String(text)) if name == "prompt" => return Ok(Self::Text(text)),
                Some(other) => {
                    return Err(format!("`{name}` is {}, expected a list of messages", kind(&other)));
                }
                None => {}
            }
        }
        let Some(instruction) = optional(&fields, "instruction")? else {
            let names: Vec<&str> = fields.keys().map(String::as_str).collect();
            return Err(format!("expected instruction, messages or prompt; there are: {}", names.join(", ")));
        };
        let input = optional(&fields, "input")?.unwrap_or_default();
        let turn = InstructRecord { instruction, input, output: String::new() };
        Ok(Self::Conversation(Conversation { system: optional(&fields, "system")?, turns: vec![turn] }))
    }
}

fn of_messages(messages: Vec<Value>, name: &str, system: Option<String>) -> Result<Question, String> {
    let (mut asked, question) = dialogue(messages, name)?;
    if let Some(instruction) = question {
        asked.turns.push(InstructRecord { instruction, ..InstructRecord::default() });
    }
    let Some(last) = asked.turns.last_mut() else { return Err(format!("`{name}` has no question")) };
    last.output.clear();
    asked.system = asked.system.or(system);
    Ok(Question::Conversation(asked))
}

/// A field that may be left out, null, or empty.
fn optional(fields: &Map<String, Value>, name: &str) -> Result<Option<String>, String> {
    match fields.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone()).filter(|text| !text.is_empty())),
        Some(other) => Err(format!("`{name}` is {}, expected a string", kind(other))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(value: &Value) -> Result<Question, String> {
        Question::parse(value.as_object().unwrap().clone())
    }

    #[test]
    fn questions_are_told_by_their_fields() {
        let turn = |instruction: &str, output: &str| InstructRecord {
            instruction: instruction.into(),
            input: String::new(),
            output: output.into(),
        };
        let asked = |system: Option<&str>, turns: Vec<InstructRecord>| {
            Question::Conversation(Conversation { system: system.map(str::to_owned), turns })
        };
        let message = |role: &str, content: &str| json!({"role": role, "content": content});
        let open = [message("user", "a"), message("assistant", "b"), message("user", "c")];
        let answered: Vec<Value> = open.iter().cloned().chain([message("assistant", "d")]).collect();
        let two = asked(None, vec![turn("a", "b"), turn("c", "")]);
        assert_eq!(parse(&json!({"messages": open})).unwrap(), two);
        assert_eq!(parse(&json!({"messages": answered})).unwrap(), two, "its answer is asked for again");
        assert_eq!(
            parse(&json!({"prompt": open, "system": "s"})).unwrap(),
            asked(Some("s"), vec![turn("a", "b"), turn("c", "")])
        );
        assert_eq!(
            parse(&json!({"conversations": [{"from": "human", "value": "a"}]})).unwrap(),
            asked(None, vec![turn("a", "")])
        );
        let input = InstructRecord { input: "i".into(), ..turn("a", "") };
        assert_eq!(
            parse(&json!({"instruction": "a", "input": "i", "output": "x"})).unwrap(),
            asked(None, vec![input])
        );
        assert_eq!(parse(&json!({"prompt": "a"})).unwrap(), Question::Text("a".into()));
        for (value, expected) in [
            (json!({"question": "a"}), "expected instruction, messages or prompt; there are: question"),
            (json!({"messages": []}), "`messages` has no question"),
            (json!({"messages": "a"}), "`messages` is a string"),
            (json!({"instruction": 7}), "`instruction` is a number, expected a string"),
        ] {
            let error = parse(&value).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_conversation_is_a_record_again() {
        let turns = json!({"messages": [
            {"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        ]});
        let Value::Array(messages) = turns["messages"].clone() else { unreachable!() };
        assert_eq!(dialogue(messages, "messages").unwrap().0.to_messages(), turns);
    }
}
