use super::*;
use crate::tokenizer::tests::{llama2, smollm};

fn record(instruction: &str, output: &str) -> InstructRecord {
    InstructRecord { instruction: instruction.into(), input: String::new(), output: output.into() }
}

fn short() -> PromptTemplate {
    PromptTemplate::new("t", "{{ instruction }}:{{ output }}").unwrap()
}

fn kept(outcome: Tokenized) -> (TokenizedExample, bool) {
    match outcome {
        Tokenized::Kept { example, truncated } => (example, truncated),
        Tokenized::Dropped(reason) => panic!("dropped: {reason}"),
    }
}

#[test]
fn prompt_and_response_are_tokenized_apart_and_eos_is_learned() {
    for tokenizer in [smollm(), llama2()] {
        let (row, truncated) =
            kept(tokenize(&record("one", "two"), &short(), &tokenizer, 99, false).unwrap());
        let prompt = tokenizer.encode_prompt("one:").unwrap();
        let answer = tokenizer.encode("two").unwrap();
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
    let template = PromptTemplate::new("t", "{{ output }}").unwrap();
    let outcome = tokenize(&record("", ""), &template, &smollm(), 99, true).unwrap();
    assert_eq!(outcome, Tokenized::Dropped(DropReason::NothingToPredict));
    // With BOS before it there is something.
    assert_eq!(kept(tokenize(&record("", ""), &template, &llama2(), 99, false).unwrap()).0.supervised(), 1);
    // Without a prompt, the first token of the answer is not a label.
    let (row, _) = kept(tokenize(&record("", "two three"), &template, &smollm(), 99, false).unwrap());
    assert_eq!(row.supervised(), row.token_ids.len() - 1);
}
