use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;
use tempfile::TempDir;

use crate::tokenizer::TextTokenizer;
use crate::tokenizer::tests::tiny;

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(format!("tiny_{name}.model"))
}

/// A directory with a `tokenizer.model` and no `tokenizer.json`.
fn directory(name: &str) -> TempDir {
    let dir = TempDir::new().unwrap();
    fs::copy(model(name), dir.path().join("tokenizer.model")).unwrap();
    dir
}

#[test]
fn ids_are_those_of_sentencepiece() {
    for name in ["sentence_piece", "sentence_piece_gemma"] {
        let (vocabulary, cases) = tiny(name);
        let dir = directory(name);
        let tokenizer = TextTokenizer::from_dir(dir.path()).unwrap();
        assert_eq!((tokenizer.bos(), tokenizer.eos()), (vocabulary.bos, vocabulary.eos.unwrap()));
        assert!(cases.len() >= 12);
        for (text, ids) in cases {
            assert_eq!(tokenizer.encode(&text).unwrap(), ids, "{name}: {text:?}");
        }
        let from_gguf = TextTokenizer::from_gguf(&vocabulary).unwrap();
        assert_eq!(tokenizer.fingerprint().unwrap(), from_gguf.fingerprint().unwrap(), "one path for both");
    }
}

#[test]
fn what_the_directory_says_goes_before_the_vocabulary() {
    let dir = directory("sentence_piece");
    let write =
        |name: &str, text: serde_json::Value| fs::write(dir.path().join(name), text.to_string()).unwrap();
    // As early conversions of Llama have it.
    write("tokenizer_config.json", json!({"bos_token": "", "eos_token": "", "unk_token": ""}));
    let tokenizer = TextTokenizer::from_dir(dir.path()).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1), 2));

    let next = tokenizer.vocab_size();
    write(
        "tokenizer_config.json",
        json!({"add_bos_token": false, "eos_token": "<end>", "chat_template": "x"}),
    );
    write("added_tokens.json", json!({"<pad>": next, "<end>": next + 1, "<unk>": 0}));
    let tokenizer = TextTokenizer::from_dir(dir.path()).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos() as usize), (None, next + 1));
    assert_eq!(tokenizer.encode("<pad>").unwrap(), [next as u32]);
    assert_eq!(tokenizer.chat_template(), Some("x"));

    write("added_tokens.json", json!({"<pad>": next + 5}));
    let error = TextTokenizer::from_dir(dir.path()).unwrap_err().to_string();
    assert!(error.contains("\"<pad>\" should have id") && error.contains("tokenizer.model"), "{error}");
}

#[test]
fn a_saved_tokenizer_has_a_tokenizer_json() {
    let (dir, saved) = (directory("sentence_piece_gemma"), TempDir::new().unwrap());
    let tokenizer = TextTokenizer::from_dir(dir.path()).unwrap();
    tokenizer.save(saved.path()).unwrap();
    let again = TextTokenizer::from_dir(saved.path()).unwrap();
    for (text, ids) in tiny("sentence_piece_gemma").1 {
        assert_eq!(again.encode(&text).unwrap(), ids, "{text:?}");
        assert_eq!(again.decode(&ids).unwrap(), tokenizer.decode(&ids).unwrap());
    }
}

#[test]
fn broken_files_are_refused_and_never_panic() {
    let dir = directory("sentence_piece");
    let path = dir.path().join("tokenizer.model");
    let whole = fs::read(&path).unwrap();
    let told = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        TextTokenizer::from_dir(dir.path()).map(|_| ()).map_err(|e| e.to_string())
    };
    for (bytes, expected) in [
        (&whole[..whole.len() - 1], "not a whole SentencePiece model"),
        (b"", "holds no pieces"),
        (b"not a model", "not a whole SentencePiece model"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "not a whole SentencePiece model"),
        (b"\x0a\x03\x0a\x01a", "model_type is 1; supported is 2"),
    ] {
        let error = told(bytes).unwrap_err();
        assert!(error.contains("tokenizer.model") && error.contains(expected), "{error}");
    }
    let collapsing = [&whole[..], b"\x1a\x02\x20\x01"].concat();
    assert!(told(&collapsing).unwrap_err().contains("remove_extra_whitespaces"));
    for at in (0..whole.len()).step_by(37) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0xFF;
        let _ = told(&bytes); // it is read, or it says why not
    }
}
