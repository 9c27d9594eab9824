//! The tokenizer of a synthetic base: a byte-level BPE without merges, so a token a byte.

use serde_json::{Map, Value, json};

/// How many tokens there are: the special ones, then the bytes in their order.
pub const TOKENS: usize = SPECIAL.len() + 256;

/// Keys of `config.json` for the special tokens, which lie where Llama 2 has them.
pub const SPECIAL_IDS: [(&str, u32); 3] = [("pad_token_id", 0), ("bos_token_id", 1), ("eos_token_id", 2)];

const SPECIAL: [&str; 3] = ["<pad>", BOS, "</s>"];
const BOS: &str = "<s>";

/// The names and contents of the files that tokenizers, transformers and pronk read, for a
/// base with a context of `model_max_length` tokens.
pub fn files(model_max_length: usize) -> [(&'static str, Value); 2] {
    let [pad, bos, eos] = SPECIAL;
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "add_bos_token": true,
        "clean_up_tokenization_spaces": false,
        "model_max_length": model_max_length,
    });
    [("tokenizer.json", tokenizer()), ("tokenizer_config.json", config)]
}

fn tokenizer() -> Value {
    let byte_level =
        || json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let added = |(id, content): (usize, &str)| {
        json!({
            "id": id, "content": content, "special": true,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        })
    };
    let special = |id: &str, kind| json!({"SpecialToken": {"id": id, "type_id": kind}});
    let text = |id: &str, kind| json!({"Sequence": {"id": id, "type_id": kind}});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": SPECIAL.into_iter().enumerate().map(added).collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": byte_level(),
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [special(BOS, 0), text("A", 0)],
            "pair": [special(BOS, 0), text("A", 0), special(BOS, 1), text("B", 1)],
            "special_tokens": {BOS: {"id": BOS, "ids": [1], "tokens": [BOS]}},
        },
        "decoder": byte_level(),
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": vocabulary(),
            "merges": [],
        },
    })
}

fn vocabulary() -> Map<String, Value> {
    let tokens = SPECIAL.into_iter().map(str::to_owned).chain(byte_characters().map(String::from));
    tokens.zip((0..).map(Value::from)).collect()
}

/// The character that stands for each byte, as GPT-2's `bytes_to_unicode` has it: printable
/// ones of Latin-1 for themselves, the others from U+0100 on.
fn byte_characters() -> impl Iterator<Item = char> {
    let mut next = 0x100..;
    (0..=u8::MAX).map(move |byte| match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
        _ => next.next().and_then(char::from_u32).unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_a_character_of_its_own() {
        let vocabulary = vocabulary();
        assert_eq!(vocabulary.len(), TOKENS);
        // Those that every byte-level vocabulary shows.
        for (token, byte) in [("A", b'A'), ("Ġ", b' '), ("Ċ", b'\n'), ("Ā", 0), ("Ń", 0xAD)] {
            assert_eq!(vocabulary[token], u32::from(byte) + 3, "{token}");
        }
    }
}
