use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

/// One of the small vocabularies of `tests/tiny_tokenizers.json`, with its texts and their ids.
pub(crate) fn tiny(name: &str) -> (GgufVocabulary, Vec<(String, Vec<u32>)>) {
    let all: Value = serde_json::from_str(include_str!("../../tests/tiny_tokenizers.json")).unwrap();
    let field = |key: &str| all[name][key].clone();
    let vocabulary = GgufVocabulary {
        model: serde_json::from_value(field("model")).unwrap(),
        pre: serde_json::from_value(field("pre")).unwrap(),
        tokens: serde_json::from_value(field("tokens")).unwrap(),
        token_types: serde_json::from_value(field("token_types")).unwrap(),
        merges: serde_json::from_value(field("merges")).unwrap(),
        scores: serde_json::from_value(field("scores")).unwrap(),
        bos: serde_json::from_value(field("bos")).unwrap(),
        eos: serde_json::from_value(field("eos")).unwrap(),
        add_space_prefix: serde_json::from_value(field("add_space_prefix")).unwrap(),
        chat_template: Some("{{ messages }}".to_owned()),
        ..GgufVocabulary::default()
    };
    let cases = field("cases").as_array().unwrap().clone();
    let case = |case: &Value| {
        (case["text"].as_str().unwrap().to_owned(), serde_json::from_value(case["ids"].clone()).unwrap())
    };
    (vocabulary, cases.iter().map(case).collect())
}

/// `SmolLM2`'s kind of tokenizer: byte-level, no BOS, EOS 2.
pub(crate) fn smollm() -> TextTokenizer {
    TextTokenizer::from_gguf(&tiny("smollm").0).unwrap()
}

/// Llama 2's kind: `SentencePiece`, BOS 1, EOS 2.
pub(crate) fn llama2() -> TextTokenizer {
    TextTokenizer::from_gguf(&tiny("sentence_piece").0).unwrap()
}

pub(crate) fn saved(tokenizer: &TextTokenizer) -> TempDir {
    let dir = TempDir::new().unwrap();
    tokenizer.save(dir.path()).unwrap();
    dir
}

pub(crate) fn edit(dir: &Path, file: &str, change: impl FnOnce(&mut Value)) {
    let path = dir.join(file);
    let mut value = fs::read(&path).map_or(json!({}), |bytes| serde_json::from_slice(&bytes).unwrap());
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

#[test]
fn a_saved_tokenizer_is_the_same_tokenizer() {
    for name in ["smollm", "gpt2", "llama3", "qwen2", "sentence_piece"] {
        let (vocabulary, cases) = tiny(name);
        let tokenizer = TextTokenizer::from_gguf(&vocabulary).unwrap();
        let dir = saved(&tokenizer);
        let again = TextTokenizer::from_dir(dir.path()).unwrap();
        assert_eq!((again.bos(), again.eos_ids()), (tokenizer.bos(), tokenizer.eos_ids()), "{name}");
        assert_eq!(again.vocab_size(), tokenizer.vocab_size());
        assert_eq!(again.fingerprint().unwrap(), tokenizer.fingerprint().unwrap());
        assert_eq!(again.chat_template(), Some("{{ messages }}"));
        for (text, ids) in cases {
            assert_eq!(again.encode(&text).unwrap(), ids, "{name}: {text:?}");
        }
        let config: Value =
            serde_json::from_slice(&fs::read(dir.path().join("tokenizer_config.json")).unwrap()).unwrap();
        assert_eq!(config["tokenizer_class"], "PreTrainedTokenizerFast");
        let special: Value =
            serde_json::from_slice(&fs::read(dir.path().join("special_tokens_map.json")).unwrap()).unwrap();
        assert_eq!(special["eos_token"], config["eos_token"]);
    }
}

#[test]
fn bos_comes_once_or_never_as_the_tokenizer_says() {
    let (llama, smollm) = (llama2(), smollm());
    assert_eq!(llama.bos(), Some(1));
    assert_eq!(llama.encode_prompt("a").unwrap(), [&[1], llama.encode("a").unwrap().as_slice()].concat());
    assert_eq!(smollm.bos(), None);
    assert_eq!(smollm.encode_prompt("a").unwrap(), smollm.encode("a").unwrap());

    // Without `add_bos_token` the post-processor decides, which `save` has set up to add BOS ..
    let dir = saved(&llama);
    edit(dir.path(), "tokenizer_config.json", |c| drop(c.as_object_mut().unwrap().remove("add_bos_token")));
    assert_eq!(TextTokenizer::from_dir(dir.path()).unwrap().bos(), Some(1));
    // .. an explicit no is a no ..
    edit(dir.path(), "tokenizer_config.json", |c| c["add_bos_token"] = json!(false));
    assert_eq!(TextTokenizer::from_dir(dir.path()).unwrap().bos(), None);
    // .. and with neither, transformers' Llama classes add it, others do not.
    edit(dir.path(), "tokenizer.json", |t| t["post_processor"] = Value::Null);
    for (class, bos) in [("LlamaTokenizer", Some(1)), ("GPT2Tokenizer", None)] {
        edit(dir.path(), "tokenizer_config.json", |c| {
            c["add_bos_token"] = Value::Null;
            c["tokenizer_class"] = json!(class);
        });
        assert_eq!(TextTokenizer::from_dir(dir.path()).unwrap().bos(), bos, "{class}");
    }
}

#[test]
fn eos_is_found_by_name_then_by_id_and_may_be_several() {
    let dir = saved(&smollm());
    fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": [0, 2]}"#).unwrap();
    assert_eq!(
        TextTokenizer::from_dir(dir.path()).unwrap().eos_ids(),
        [2, 0],
        "the named one is the learned one"
    );

    edit(dir.path(), "tokenizer_config.json", |c| c["eos_token"] = json!({"content": "<|im_start|>"}));
    assert_eq!(TextTokenizer::from_dir(dir.path()).unwrap().eos_ids(), [1, 0, 2]);

    fs::remove_file(dir.path().join("special_tokens_map.json")).unwrap();
    edit(dir.path(), "tokenizer_config.json", |c| c["eos_token"] = Value::Null);
    assert_eq!(TextTokenizer::from_dir(dir.path()).unwrap().eos(), 0);

    fs::write(dir.path().join("generation_config.json"), "{}").unwrap();
    let error = TextTokenizer::from_dir(dir.path()).unwrap_err().to_string();
    assert!(error.contains("no EOS token") && error.contains("eos_token_id"), "{error}");
    fs::write(dir.path().join("config.json"), r#"{"eos_token_id": 999999}"#).unwrap();
    let error = TextTokenizer::from_dir(dir.path()).unwrap_err().to_string();
    assert!(error.contains("999999") && error.contains("not in the vocabulary"), "{error}");
}

#[test]
fn the_padding_and_truncation_of_a_published_file_are_ignored() {
    let tokenizer = smollm();
    let dir = saved(&tokenizer);
    edit(dir.path(), "tokenizer.json", |t| {
        t["truncation"] =
            json!({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
        t["padding"] = json!({"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": null,
                              "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"});
    });
    let again = TextTokenizer::from_dir(dir.path()).unwrap();
    let text = "Hello, world! Hello, world!";
    assert_eq!(again.encode(text).unwrap(), tokenizer.encode(text).unwrap());
}

#[test]
fn a_template_beside_and_a_class_of_transformers_5_are_made_fit_for_others() {
    let dir = saved(&smollm());
    edit(dir.path(), "tokenizer_config.json", |c| {
        c.as_object_mut().unwrap().remove("chat_template");
        c["tokenizer_class"] = json!("TokenizersBackend");
        c["is_local"] = json!(true);
    });
    fs::write(dir.path().join("chat_template.jinja"), "{{ x }}").unwrap();
    let out = saved(&TextTokenizer::from_dir(dir.path()).unwrap());
    let config: Value =
        serde_json::from_slice(&fs::read(out.path().join("tokenizer_config.json")).unwrap()).unwrap();
    assert_eq!(config["tokenizer_class"], "PreTrainedTokenizerFast");
    assert_eq!(config["chat_template"], "{{ x }}");
    assert_eq!(config.get("is_local"), None);
}

#[test]
fn damaged_files_are_errors_that_name_them() {
    let empty = TempDir::new().unwrap();
    let error = TextTokenizer::from_dir(empty.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json: cannot read the tokenizer"), "{error}");

    let read = |file: &str, content: &[u8]| {
        let dir = saved(&smollm());
        fs::write(dir.path().join(file), content).unwrap();
        TextTokenizer::from_dir(dir.path()).unwrap_err().to_string()
    };
    let error = read("tokenizer.json", b"{\"model\": {\"type\": \"BPE\"");
    assert!(error.contains("not a valid tokenizer.json"), "{error}");
    let error = read("tokenizer.json", b"{\"\xff\": 1}");
    assert!(error.contains("invalid UTF-8 at byte 2"), "{error}");
    let error = read("tokenizer_config.json", b"[1, 2]");
    assert!(error.contains("tokenizer_config.json") && error.contains("expected a JSON object"), "{error}");
    let error = read("tokenizer_config.json", br#"{"eos_token": "<nowhere>"}"#);
    assert!(error.contains("<nowhere>") && error.contains("eos_token"), "{error}");
    // The tokenizers crate panics on this one.
    let model = r#"{"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}"#;
    let error = read("tokenizer.json", format!(r#"{{"version": "1.0", "model": {model}}}"#).as_bytes());
    assert!(error.contains("merge 0 needs the token \"ab\""), "{error}");
}

/// The tokenizers crate panics on both.
#[test]
fn a_post_processor_that_asks_for_more_than_there_is_is_refused() {
    let names =
        json!([{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]);
    let second = json!([{"Sequence": {"id": "B", "type_id": 0}}]);
    for (single, told) in
        [(names, "\"<s>\", which is not among its special_tokens"), (second, "a second one, B")]
    {
        let template =
            json!({"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}});
        for processor in [template.clone(), json!({"type": "Sequence", "processors": [template]})] {
            let dir = saved(&smollm());
            edit(dir.path(), "tokenizer.json", |file| file["post_processor"] = processor);
            let error = TextTokenizer::from_dir(dir.path()).unwrap_err().to_string();
            assert!(error.contains("tokenizer.json") && error.contains(told), "{error}");
        }
    }
}

/// Cuts text into words by an expression that takes for ever on some.
pub(crate) fn split_for_ever(file: &mut Value) {
    file["pre_tokenizer"] =
        json!({"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": false});
}

fn added(id: u32, content: &str) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
           "normalized": true, "special": false})
}

/// The tokenizers crate panics on both.
#[test]
fn expressions_that_take_for_ever_are_errors() {
    let dir = saved(&smollm());
    let long = "a".repeat(40) + "b";
    let id = smollm().vocab_size() as u32;
    edit(dir.path(), "tokenizer.json", |file| {
        split_for_ever(file);
        file["decoder"] = json!({"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"});
        file["added_tokens"].as_array_mut().unwrap().push(added(id, &long));
    });
    let tokenizer = TextTokenizer::from_dir(dir.path()).unwrap();
    let text = format!("a{long}"); // the added token is taken out of others
    let of_encoder = tokenizer.encoder().encode(&format!("{}c", "a".repeat(40)), &mut Vec::new());
    let errors = [
        tokenizer.encode(&format!("{}c", "a".repeat(40))).unwrap_err(),
        of_encoder.unwrap_err(),
        tokenizer.decode(&[id]).unwrap_err(),
        tokenizer.decode_with_specials(&[id]).unwrap_err(),
        tokenizer.decode_stream().step(id).unwrap_err(),
    ];
    for error in errors.map(|error| error.to_string()) {
        assert!(
            error.contains("tokenizer.json: cannot ") && error.contains("retry-limit-in-match"),
            "{error}"
        );
    }
    assert!(tokenizer.encode(&text).is_ok_and(|ids| ids.ends_with(&[id])));
    assert!(!crate::is_guarded());
}

/// Eight rules that each write sixteen letters for one make 4 GB of one letter.
#[test]
fn tokenizers_that_make_much_of_little_are_refused() {
    let eight = |letter: &str| -> Vec<Value> {
        let content = letter.repeat(16);
        (0..8)
            .map(|_| json!({"type": "Replace", "pattern": {"String": letter}, "content": content}))
            .collect()
    };
    let normalizers = |letter: &str| json!({"type": "Sequence", "normalizers": eight(letter)});
    let read = |change: &dyn Fn(&mut Value)| {
        let dir = saved(&smollm());
        edit(dir.path(), "tokenizer.json", change);
        TextTokenizer::from_dir(dir.path())
    };
    let refused = |change: &dyn Fn(&mut Value)| {
        let error = read(change).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json: "), "{error}");
        error
    };
    // What is read is given a letter, and its added tokens.
    let error = refused(&|file| file["normalizer"] = normalizers("a"));
    assert!(error.contains("its normalizer would make more than 65536 bytes"), "{error}");
    let error = refused(&|file| {
        file["normalizer"] = normalizers("b");
        file["added_tokens"].as_array_mut().unwrap().push(added(430, "bob"));
    });
    assert!(
        error.contains("an added token of 3 bytes: its normalizer would make more than 65536"),
        "{error}"
    );
    // Others come with the texts; of several pieces too.
    let tokenizer = read(&|file| file["normalizer"] = normalizers("b")).unwrap();
    assert_eq!(tokenizer.encode("aa").unwrap(), smollm().encode("aa").unwrap());
    let error = tokenizer.encode("a<|im_end|>b").unwrap_err().to_string();
    assert!(
        error.contains("cannot encode \"a<|im_end|>b\" (12 bytes): its normalizer would make"),
        "{error}"
    );
    let long = json!({"type": "Replace", "pattern": {"Regex": "b"}, "content": "x".repeat(10_000)});
    let tokenizer = read(&|file| file["normalizer"] = long.clone()).unwrap();
    assert!(tokenizer.encode("b").is_ok() && tokenizer.encode(&"b".repeat(100)).is_err());
    let error = refused(&|file| file["decoder"] = json!({"type": "Sequence", "decoders": eight("a")}));
    assert!(error.contains("its decoder may make 6975757441 bytes of one, expected at most 64"), "{error}");
    let spelling =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let error = refused(&|file| {
        file["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": vec![spelling.clone(); 30]});
    });
    assert!(error.contains("spells a text anew 30 times, expected at most 4"), "{error}");
}

#[test]
fn a_stream_gives_the_same_text_in_whole_characters() {
    for tokenizer in [smollm(), llama2()] {
        for text in ["Hello there, you two", "emoji: 😀👩‍👩‍👧‍👦!", "日本語 and Ærø\n\n  x", ""]
        {
            let ids = tokenizer.encode_prompt(text).unwrap();
            let mut stream = tokenizer.decode_stream();
            let mut shown = String::new();
            for &id in &ids {
                let piece = stream.step(id).unwrap();
                assert!(!piece.contains('\u{fffd}'), "{piece:?}");
                shown += &piece;
            }
            shown += &stream.finish().unwrap();
            assert_eq!(shown, text);
            assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        }
    }
}

#[test]
fn a_stream_survives_bytes_that_are_no_text() {
    let tokenizer = smollm();
    let byte = |byte: char| tokenizer.token_id(&byte.to_string()).unwrap();
    let lead = byte('ð'); // the spelling of byte 0xf0, which begins a character of four bytes
    let mut stream = tokenizer.decode_stream();
    let mut shown = String::new();
    for _ in 0..20 {
        shown += &stream.step(lead).unwrap();
    }
    assert!(!shown.is_empty(), "rubbish is not held back for ever");
    for &id in &tokenizer.encode(" and on").unwrap() {
        shown += &stream.step(id).unwrap();
    }
    assert!(shown.ends_with(" and on"), "{shown:?}");

    let mut cut = tokenizer.decode_stream();
    assert_eq!(cut.step(lead).unwrap(), "");
    assert_eq!(cut.finish().unwrap(), "\u{fffd}", "the end shows what was held back");
}

#[test]
fn special_tokens_are_shown_only_on_request() {
    let tokenizer = smollm();
    let ids = tokenizer.encode("<|im_start|>a<|im_end|>").unwrap();
    assert_eq!((ids.first(), ids.last()), (Some(&1), Some(&2)));
    assert_eq!(tokenizer.decode(&ids).unwrap(), "a");
    assert_eq!(tokenizer.decode_with_specials(&ids).unwrap(), "<|im_start|>a<|im_end|>");
    assert_eq!(tokenizer.token(2).as_deref(), Some("<|im_end|>"));
    assert_eq!(tokenizer.token(1_000_000), None);
}

#[test]
fn fingerprints_tell_tokenizers_apart() {
    let (mut vocabulary, _) = tiny("smollm");
    let one = TextTokenizer::from_gguf(&vocabulary).unwrap().fingerprint().unwrap().to_owned();
    assert_eq!(one, smollm().fingerprint().unwrap());
    vocabulary.eos = Some(0);
    assert_ne!(one, TextTokenizer::from_gguf(&vocabulary).unwrap().fingerprint().unwrap());
    vocabulary.eos = Some(2);
    vocabulary.pre = None;
    assert_ne!(one, TextTokenizer::from_gguf(&vocabulary).unwrap().fingerprint().unwrap());
}

#[test]
fn an_encoder_gives_the_same_ids_the_first_time_and_again() {
    for name in ["smollm", "gpt2", "llama3", "qwen2", "sentence_piece"] {
        let (vocabulary, cases) = tiny(name);
        let tokenizer = TextTokenizer::from_gguf(&vocabulary).unwrap();
        let mut encoder = tokenizer.encoder();
        let mut ids = Vec::new();
        for (text, expected) in cases.iter().chain(&cases) {
            let before = ids.len();
            encoder.encode(text, &mut ids).unwrap();
            assert_eq!(&ids[before..], expected, "{name}: {text:?}");
        }
    }
}
