//! Chat templates as transformers renders them; see `scripts/make-chat-goldens`.

use serde_json::Value;

use super::*;
use crate::tokenizer::tests::llama2;

/// The conversation of a golden's messages.
fn conversation(messages: &Value) -> Conversation {
    let mut found = Conversation::default();
    let mut question = String::new();
    for message in messages.as_array().unwrap() {
        let content = message["content"].as_str().unwrap().to_owned();
        match message["role"].as_str().unwrap() {
            "system" => found.system = Some(content),
            "user" => question = content,
            _ => found.turns.push(InstructRecord {
                instruction: std::mem::take(&mut question),
                input: String::new(),
                output: content,
            }),
        }
    }
    found
}

fn text(segments: Result<Vec<Segment>, DataError>) -> Result<String, DataError> {
    Ok(segments?.into_iter().map(|segment| segment.text).collect())
}

/// Whether ours is what transformers gave: the same text, or refused where it was refused.
fn check(name: &str, what: &str, ours: Result<String, DataError>, theirs: &Value) {
    match (ours, theirs["text"].as_str(), theirs["error"].as_str()) {
        (Ok(ours), Some(text), _) => assert_eq!(ours, text, "{name}: {what}"),
        (Err(ours), _, Some(error)) => {
            assert!(ours.to_string().contains(error), "{name}: {ours} against {error}");
        }
        (ours, ..) => panic!("{name}: {what}: {ours:?} against {theirs}"),
    }
}

fn check_all(goldens: &str) -> usize {
    let cases: Value = serde_json::from_str(goldens).unwrap();
    let cases = cases.as_array().unwrap();
    for case in cases {
        let name = case["name"].as_str().unwrap();
        // The special tokens are those of Llama 2.
        let template = PromptTemplate::new(name, case["template"].as_str().unwrap(), &llama2()).unwrap();
        for rendering in case["renderings"].as_array().unwrap() {
            let conversation = conversation(&rendering["messages"]);
            let prompt = text(template.render_prompt(&conversation));
            check(name, "prompt", prompt, &rendering["prompt"]);
            let whole = text(template.render(&Record::Conversation(conversation), Learn::Last));
            let theirs = ["whole", "prompt"].map(|part| rendering[part]["text"].as_str());
            // Some templates drop from a whole what they asked with: then nothing can be learned from it.
            let marked = template.source().contains("endgeneration");
            if let [Some(all), Some(asked)] = theirs
                && !all.starts_with(asked)
                && !marked
            {
                let error = whole.unwrap_err().to_string();
                assert!(error.contains("when they are to be answered"), "{name}: {error}");
            } else {
                check(name, "whole", whole, &rendering["whole"]);
            }
        }
    }
    cases.len()
}

#[test]
fn chat_templates_render_as_in_transformers() {
    assert_eq!(check_all(include_str!("../../../../tests/golden/chat-templates.json")), 11);
}

/// Published templates, where `PRONK_CHAT_GOLDENS` names what `scripts/make-chat-goldens --real` said of them.
#[test]
fn published_chat_templates_render_as_in_transformers() {
    let Some(path) = std::env::var_os("PRONK_CHAT_GOLDENS") else { return };
    assert!(check_all(&std::fs::read_to_string(path).unwrap()) > 0);
}
