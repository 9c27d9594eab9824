//! The tokenizer's part of a GGUF file's metadata, read and written.

use pronk_data::GgufVocabulary;
use pronk_model::{GgufFile, GgufValue};

/// What `file` says of its tokenizer.
pub fn vocabulary(file: &GgufFile) -> GgufVocabulary {
    let text = |key: &str| file.text(&format!("tokenizer.{key}")).map(str::to_owned);
    let id = |key: &str| file.number(&format!("tokenizer.ggml.{key}_token_id")).map(|n| n as u32);
    let flag = |key: &str| file.number(&format!("tokenizer.ggml.{key}")).map(|n| n != 0.0);
    GgufVocabulary {
        model: text("ggml.model").unwrap_or_default(),
        pre: text("ggml.pre"),
        tokens: file.texts("tokenizer.ggml.tokens"),
        token_types: file.numbers("tokenizer.ggml.token_type").into_iter().map(|n| n as i32).collect(),
        merges: file.texts("tokenizer.ggml.merges"),
        scores: file.numbers("tokenizer.ggml.scores").into_iter().map(|n| n as f32).collect(),
        bos: id("bos"),
        eos: id("eos"),
        unknown: id("unknown"),
        padding: id("padding"),
        add_bos: flag("add_bos_token"),
        add_space_prefix: flag("add_space_prefix"),
        chat_template: text("chat_template"),
    }
}

/// The key of the chat template.
pub const CHAT_TEMPLATE: &str = "tokenizer.chat_template";

/// The keys that `vocabulary` is written as.
pub fn keys(vocabulary: GgufVocabulary) -> Vec<(String, GgufValue)> {
    let texts = |texts: Vec<String>| GgufValue::Array(texts.into_iter().map(GgufValue::String).collect());
    let scores = vocabulary.scores.into_iter().map(GgufValue::F32).collect();
    let types = vocabulary.token_types.into_iter().map(GgufValue::I32).collect();
    let lists = [
        ("tokens", texts(vocabulary.tokens)),
        ("token_type", GgufValue::Array(types)),
        ("merges", texts(vocabulary.merges)),
        ("scores", GgufValue::Array(scores)),
    ];
    let single = [
        ("bos_token_id", vocabulary.bos.map(GgufValue::U32)),
        ("eos_token_id", vocabulary.eos.map(GgufValue::U32)),
        ("unknown_token_id", vocabulary.unknown.map(GgufValue::U32)),
        ("padding_token_id", vocabulary.padding.map(GgufValue::U32)),
        ("add_bos_token", vocabulary.add_bos.map(GgufValue::Bool)),
        ("add_space_prefix", vocabulary.add_space_prefix.map(GgufValue::Bool)),
    ];
    let words = [("model", Some(vocabulary.model.clone())), ("pre", vocabulary.pre)];
    let words = words.into_iter().filter_map(|(key, word)| Some((key, GgufValue::String(word?))));
    // llama.cpp wants merges of a byte-level vocabulary even where there are none.
    let wanted = if vocabulary.model == "gpt2" { "merges" } else { "scores" };
    let of_model = |key: &str| !["merges", "scores"].contains(&key) || key == wanted;
    let lists = lists.into_iter().filter(|(key, _)| of_model(key));
    let single = single.into_iter().filter_map(|(key, value)| Some((key, value?)));
    let ggml = words.chain(lists).chain(single).map(|(key, value)| (format!("tokenizer.ggml.{key}"), value));
    let template = vocabulary.chat_template.map(|text| (CHAT_TEMPLATE.to_owned(), GgufValue::String(text)));
    ggml.chain(template).collect()
}
