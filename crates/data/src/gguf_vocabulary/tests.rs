use super::*;
use crate::tokenizer::TextTokenizer;
use crate::tokenizer::tests::tiny;

#[test]
fn ids_are_those_of_the_vocabularys_own_library() {
    for name in ["smollm", "gpt2", "llama3", "qwen2", "sentence_piece", "sentence_piece_gemma"] {
        let (vocabulary, cases) = tiny(name);
        let tokenizer = TextTokenizer::from_gguf(&vocabulary).unwrap();
        assert!(cases.len() >= 12);
        for (text, ids) in cases {
            assert_eq!(tokenizer.encode(&text).unwrap(), ids, "{name}: {text:?}");
        }
    }
}

#[test]
fn every_token_keeps_its_id() {
    for name in ["smollm", "sentence_piece"] {
        let (vocabulary, _) = tiny(name);
        let tokenizer = TextTokenizer::from_gguf(&vocabulary).unwrap();
        assert_eq!(tokenizer.vocab_size(), vocabulary.tokens.len());
        for (id, token) in (0..).zip(&vocabulary.tokens) {
            assert_eq!(tokenizer.token(id).as_ref(), Some(token));
        }
    }
}

#[test]
fn bos_is_added_as_the_file_says_or_llama_cpp_does() {
    for (name, add_bos, bos) in [
        ("smollm", None, None),
        ("smollm", Some(true), Some(0)),
        ("llama3", None, Some(0)),
        ("llama3", Some(false), None),
        ("sentence_piece", None, Some(1)),
        ("sentence_piece", Some(false), None),
    ] {
        let vocabulary = GgufVocabulary { add_bos, ..tiny(name).0 };
        assert_eq!(TextTokenizer::from_gguf(&vocabulary).unwrap().bos(), bos, "{name} {add_bos:?}");
    }
}

#[test]
fn the_space_in_front_can_be_switched_off() {
    let vocabulary = GgufVocabulary { add_space_prefix: Some(false), ..tiny("sentence_piece").0 };
    let tokenizer = TextTokenizer::from_gguf(&vocabulary).unwrap();
    let with = TextTokenizer::from_gguf(&tiny("sentence_piece").0).unwrap();
    assert_eq!(tokenizer.encode(" the").unwrap(), with.encode("the").unwrap());
    assert_eq!(tokenizer.decode(&tokenizer.encode(" the").unwrap()).unwrap(), " the");
    assert_eq!(with.decode(&with.encode("the").unwrap()).unwrap(), "the");
}

#[test]
fn user_defined_tokens_are_whole_but_not_special() {
    let (mut vocabulary, _) = tiny("smollm");
    vocabulary.tokens.push("<think>".to_owned());
    vocabulary.token_types.push(USER_DEFINED);
    let tokenizer = TextTokenizer::from_gguf(&vocabulary).unwrap();
    let ids = tokenizer.encode("a<think>b").unwrap();
    assert_eq!(ids.get(1), Some(&(vocabulary.tokens.len() as u32 - 1)));
    assert_eq!(tokenizer.decode(&ids).unwrap(), "a<think>b");
}

#[test]
fn scores_become_merges_best_first() {
    let tokens = ["<unk>", "a", "b", "ab", "ba", "aba", "<0x61>"];
    let vocabulary = GgufVocabulary {
        model: "llama".to_owned(),
        tokens: tokens.map(str::to_owned).to_vec(),
        token_types: vec![UNKNOWN, 1, 1, 1, 1, 1, 6],
        scores: vec![0.0, -9.0, -9.0, -2.0, -1.0, -3.0, 0.0],
        ..GgufVocabulary::default()
    };
    let ids = vocabulary.ids().unwrap();
    let merges = merges::from_scores(&vocabulary, &ids).unwrap();
    let merges: Vec<_> = merges.iter().map(|(l, r)| (l.as_str(), r.as_str())).collect();
    assert_eq!(merges, [("b", "a"), ("a", "b"), ("ab", "a"), ("a", "ba")]);
}

fn refusal(name: &str, change: impl FnOnce(&mut GgufVocabulary)) -> String {
    let (mut vocabulary, _) = tiny(name);
    change(&mut vocabulary);
    TextTokenizer::from_gguf(&vocabulary).unwrap_err().to_string()
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let error = refusal("smollm", |v| v.pre = Some("tekken".to_owned()));
    assert!(error.contains("\"tekken\"") && error.contains("smollm, llama-bpe, qwen2"), "{error}");
    let error = refusal("smollm", |v| v.model = "t5".to_owned());
    assert!(error.contains("\"t5\"") && error.contains("gpt2") && error.contains("llama"), "{error}");
}

#[test]
fn vocabularies_that_do_not_hold_together_are_refused() {
    for (name, change, expected) in [
        ("smollm", (|v| v.tokens.clear()) as fn(&mut GgufVocabulary), "tokens is missing"),
        ("smollm", |v| v.token_types.truncate(v.token_types.len() - 1), "token_type has"),
        ("smollm", |v| v.tokens[9] = v.tokens[8].clone(), "are both spelled"),
        ("smollm", |v| v.merges.clear(), "merges is missing"),
        ("smollm", |v| v.merges.push("nospace".to_owned()), "expected two tokens"),
        ("smollm", |v| v.merges.push("Ġthere Ġthere".to_owned()), "not in the vocabulary"),
        ("smollm", |v| v.merges.push(format!("a {}", "b".repeat(99_999))), "not in the vocabulary"),
        ("smollm", |v| v.eos = None, "no EOS token"),
        ("smollm", |v| v.eos = Some(u32::MAX), "EOS token id 4294967295"),
        ("smollm", |v| (v.bos, v.add_bos) = (None, Some(true)), "bos_token_id is missing"),
        ("sentence_piece", |v| v.scores.clear(), "scores is missing"),
        ("sentence_piece", |v| v.scores.truncate(v.scores.len() - 1), "scores has"),
        ("sentence_piece", |v| v.tokens[300] = "x".repeat(5000), "5000 bytes long"),
        ("sentence_piece", |v| v.bos = Some(70_000), "BOS token id 70000"),
    ] {
        let error = refusal(name, change);
        assert!(error.contains(expected), "expected {expected:?} in {error:?}");
    }
}

#[test]
fn scores_that_are_no_numbers_do_no_harm() {
    let (mut vocabulary, _) = tiny("sentence_piece");
    vocabulary.scores.fill(f32::NAN);
    let tokenizer = TextTokenizer::from_gguf(&vocabulary).unwrap();
    let ids = tokenizer.encode("Hello").unwrap();
    assert_eq!(tokenizer.decode(&ids).unwrap(), "Hello");
}
