use super::*;
use crate::record::InstructRecord;
use crate::tokenizer::tests::{llama2, smollm};

fn record(instruction: &str, output: &str) -> Record {
    InstructRecord { instruction: instruction.into(), input: String::new(), output: output.into() }.into()
}

/// A template over records.
fn short() -> PromptTemplate {
    PromptTemplate::new("t", "{{ instruction }}:{{ output }}", &smollm()).unwrap()
}

fn tokenize(
    record: &Record,
    template: &PromptTemplate,
    tokenizer: &TextTokenizer,
    max_seq_len: usize,
    train_on_inputs: bool,
) -> Result<Tokenized, DataError> {
    let config = RowConfig { max_seq_len, train_on_inputs, learn: Learn::All };
    super::tokenize(&mut tokenizer.encoder(), record, template, config)
}

fn kept(outcome: Tokenized) -> (TokenizedExample, bool) {
    match outcome {
        Tokenized::Kept { example, truncated, .. } => (example, truncated),
        Tokenized::Dropped(reason) => panic!("dropped: {reason}"),
    }
}

#[test]
fn prompt_and_response_are_tokenized_apart_and_eos_is_learned() {
    for tokenizer in [smollm(), llama2()] {
        let (row, truncated) =
            kept(tokenize(&record("one", "two"), &short(), &tokenizer, 99, false).unwrap());
        let prompt = tokenizer.encode_prompt("one:").unwrap();
        let mut answer = Vec::new();
        tokenizer.encoder().encode_next("two", &mut answer).unwrap();
        assert_eq!(row.token_ids, [prompt.as_slice(), &answer, &[tokenizer.eos()]].concat());
        let mask: Vec<bool> = (0..row.token_ids.len()).map(|i| i >= prompt.len()).collect();
        assert_eq!(row.loss_mask, mask);
        assert_eq!(row.supervised(), answer.len() + 1);
        assert!(!truncated);
        // BOS once or never, and never a second one before the response.
        let bos = row.token_ids.iter().filter(|&&id| Some(id) == tokenizer.bos()).count();
        assert_eq!(bos, usize::from(tokenizer.bos().is_some()));
    }
}

#[test]
fn with_train_on_inputs_all_but_the_first_are_labels() {
    let (row, _) = kept(tokenize(&record("one", "two"), &short(), &llama2(), 99, true).unwrap());
    assert!(!row.loss_mask[0]);
    assert_eq!(row.supervised(), row.token_ids.len() - 1);
}

#[test]
fn cutting_keeps_the_front_and_never_a_row_without_answer() {
    let tokenizer = smollm();
    let whole = kept(tokenize(&record("one", "two three"), &short(), &tokenizer, 99, false).unwrap()).0;
    let prompt = tokenizer.encode_prompt("one:").unwrap().len();
    for limit in 2..whole.token_ids.len() + 2 {
        for train_on_inputs in [false, true] {
            let outcome =
                tokenize(&record("one", "two three"), &short(), &tokenizer, limit, train_on_inputs).unwrap();
            if limit <= prompt {
                assert_eq!(outcome, Tokenized::Dropped(DropReason::AnswerCutAway), "limit {limit}");
                continue;
            }
            let (row, truncated) = kept(outcome);
            assert_eq!(truncated, limit < whole.token_ids.len());
            assert_eq!(row.token_ids, whole.token_ids[..limit.min(whole.token_ids.len())]);
            assert_eq!(row.token_ids.last() == Some(&tokenizer.eos()), !truncated);
            assert!(row.supervised() > 0);
        }
    }
}

#[test]
fn an_empty_output_teaches_to_stop() {
    let tokenizer = smollm();
    let (row, _) = kept(tokenize(&record("one", ""), &short(), &tokenizer, 99, false).unwrap());
    assert_eq!(row.supervised(), 1);
    assert_eq!(row.token_ids.last(), Some(&tokenizer.eos()));
    assert_eq!(row.loss_mask.last(), Some(&true));
}

#[test]
fn a_lone_eos_has_nothing_to_be_predicted_from() {
    let template = PromptTemplate::new("t", "{{ output }}", &smollm()).unwrap();
    let outcome = tokenize(&record("", ""), &template, &smollm(), 99, true).unwrap();
    assert_eq!(outcome, Tokenized::Dropped(DropReason::NothingToPredict));
    // With BOS before it there is something.
    assert_eq!(kept(tokenize(&record("", ""), &template, &llama2(), 99, false).unwrap()).0.supervised(), 1);
    // Without a prompt, the first token of the answer is not a label.
    let (row, _) = kept(tokenize(&record("", "two three"), &template, &smollm(), 99, false).unwrap());
    assert_eq!(row.supervised(), row.token_ids.len() - 1);
}

/// Marks by token, for a conversation in `ChatML`; the ids are those of the whole text.
#[test]
fn answers_of_a_conversation_end_in_their_last_eos() {
    let chatml = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}\
                  {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    let tokenizer = smollm();
    let template = PromptTemplate::new("t", chatml, &tokenizer).unwrap();
    let turns = [("one", "two"), ("three", "four")].map(|(instruction, output)| InstructRecord {
        instruction: instruction.into(),
        input: String::new(),
        output: output.into(),
    });
    let conversation = Conversation { system: None, turns: turns.into() };
    let record = Record::Conversation(conversation.clone());
    let row = |learn, train_on_inputs| {
        let config = RowConfig { max_seq_len: 999, train_on_inputs, learn };
        kept(super::tokenize(&mut tokenizer.encoder(), &record, &template, config).unwrap()).0
    };
    let all = row(Learn::All, false);
    let whole: String =
        template.render(&record, Learn::All).unwrap().into_iter().map(|segment| segment.text).collect();
    assert_eq!(all.token_ids, tokenizer.encode(whole.trim_end()).unwrap());
    let learned = |row: &TokenizedExample| {
        let labels = row.token_ids.iter().zip(&row.loss_mask).filter(|(_, label)| **label).map(|(id, _)| *id);
        tokenizer.decode_with_specials(&labels.collect::<Vec<_>>()).unwrap()
    };
    assert_eq!(learned(&all), "two<|im_end|>four<|im_end|>");
    assert_eq!(all.token_ids.last(), Some(&tokenizer.eos()));
    let last = row(Learn::Last, false);
    assert_eq!((learned(&last).as_str(), &last.token_ids), ("four<|im_end|>", &all.token_ids));
    assert_eq!(row(Learn::All, true).supervised(), all.token_ids.len() - 1);
    let prompt = tokenize_prompt(&tokenizer, &conversation, &template).unwrap();
    assert_eq!(prompt, all.token_ids[..all.token_ids.len() - last.supervised()]);
}

/// `SentencePiece`'s space belongs to the beginning of a text, not to each of its pieces.
#[test]
fn pieces_of_a_text_have_the_tokens_of_the_whole() {
    let tokenizer = llama2();
    for pieces in [["one two", " one", "\ntwo"], ["a", "b", " c"], ["", "one", "  two "]] {
        let mut ids = Vec::new();
        let mut encoder = tokenizer.encoder();
        for piece in pieces {
            if ids.is_empty() {
                encoder.encode(piece, &mut ids)
            } else {
                encoder.encode_next(piece, &mut ids)
            }
            .unwrap();
        }
        assert_eq!(tokenizer.decode(&ids).unwrap(), pieces.concat());
    }
}
