//! Tokenizers and chat templates.

use std::path::Path;
use std::sync::LazyLock;

use pronk_data::{
    Conversation, GgufVocabulary, InstructRecord, Learn, PromptTemplate, Record, TextTokenizer,
};

use crate::folder::Folder;

/// That of the tiny bases.
pub static TOKENIZER: LazyLock<TextTokenizer> = LazyLock::new(|| {
    let folder = Folder::new();
    folder.write("tokenizer.json", include_bytes!("../../tests/golden/tiny-gqa/tokenizer.json"));
    folder
        .write("tokenizer_config.json", include_bytes!("../../tests/golden/tiny-gqa/tokenizer_config.json"));
    TextTokenizer::from_dir(folder.path()).expect("a whole tokenizer")
});

/// Letters, digits, spaces, a character of four bytes, and what special tokens are spelled with.
const TEXT: &str = "Sheep  jump 42\u{1f411}\n<|im_end|></s> \u{2581}e\u{301}";

pub fn tokenizer(bytes: &[u8]) {
    let names = [
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "added_tokens.json",
        "chat_template.jinja",
        "config.json",
    ];
    let folder = Folder::of(bytes, &names);
    if let Ok(tokenizer) = TextTokenizer::from_dir(folder.path()) {
        used(&tokenizer, folder.path());
    }
}

/// Lines: what the vocabulary is, then its tokens, each behind its type and its score; merges behind an empty line.
pub fn gguf_vocabulary(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let mut lines = text.split('\n');
    let mut word = || lines.next().unwrap_or_default().to_owned();
    let [model, pre, numbers] = [word(), word(), word()];
    let numbers: Vec<Option<u32>> = numbers.split(' ').map(|number| number.parse().ok()).collect();
    let number = |at: usize| numbers.get(at).copied().flatten();
    let flag = |at: usize| number(at).map(|number| number > 0);
    let mut vocabulary = GgufVocabulary {
        model,
        pre: Some(pre).filter(|pre| !pre.is_empty()),
        bos: number(0),
        eos: number(1),
        unknown: number(2),
        padding: number(3),
        add_bos: flag(4),
        add_space_prefix: flag(5),
        ..GgufVocabulary::default()
    };
    for line in lines.by_ref().take_while(|line| !line.is_empty()) {
        let mut parts = line.splitn(3, ' ');
        let mut part = || parts.next().unwrap_or_default();
        vocabulary.token_types.extend(part().parse::<i32>());
        vocabulary.scores.extend(part().parse::<f32>());
        vocabulary.tokens.push(part().to_owned());
    }
    vocabulary.merges = lines.map(str::to_owned).collect();
    if let Ok(tokenizer) = TextTokenizer::from_gguf(&vocabulary) {
        used(&tokenizer, Folder::new().path());
    }
}

fn used(tokenizer: &TextTokenizer, dir: &Path) {
    let ids = tokenizer.encode(TEXT).unwrap_or_default();
    let _ = tokenizer.encode_prompt(TEXT);
    let _ = tokenizer.decode(&ids);
    let _ = tokenizer.decode_with_specials(&[0, 1, 2, u32::MAX]);
    let _ = tokenizer.fingerprint();
    let _ = tokenizer.to_gguf(tokenizer.vocab_size().saturating_add(3));
    for name in ["chat", "alpaca"] {
        if let Ok(template) = PromptTemplate::load(name, tokenizer) {
            rendered(&template, tokenizer);
        }
    }
    if tokenizer.save(dir).is_ok() {
        let _ = TextTokenizer::from_dir(dir);
    }
}

/// A template that came with a base or an adapter.
pub fn chat_template(bytes: &[u8]) {
    let Ok(source) = std::str::from_utf8(bytes) else { return };
    if let Ok(template) = PromptTemplate::new("chat", source, &TOKENIZER) {
        rendered(&template, &TOKENIZER);
    }
}

fn rendered(template: &PromptTemplate, tokenizer: &TextTokenizer) {
    let turn = |instruction: &str, input: &str| InstructRecord {
        instruction: instruction.to_owned(),
        input: input.to_owned(),
        output: "It is green.".to_owned(),
    };
    let conversation = Conversation {
        system: Some("Answer in words.".to_owned()),
        turns: vec![turn("Colour of grass?", ""), turn("Of it?", "moss")],
    };
    let _ = template.render_prompt(&conversation);
    let _ = template.to_ollama(Some("<s>"));
    let _ = template.markers(tokenizer);
    let record = Record::Conversation(conversation);
    for learn in [Learn::All, Learn::Last] {
        let _ = template.render(&record, learn);
    }
}
