//! The merges of a BPE: as a GGUF file lists them, or as a `SentencePiece` vocabulary implies them.

use std::cmp::Reverse;
use std::collections::HashMap;

use super::{GgufVocabulary, NORMAL};

/// No token of any known vocabulary is nearly as long; a longer one would take quadratic time to split.
const LONGEST_TOKEN: usize = 4096;

/// Splits "left right" pairs, and makes sure of all three tokens: the tokenizers crate panics on some that lack one.
pub(super) fn listed(
    vocabulary: &GgufVocabulary,
    ids: &HashMap<&str, u32>,
) -> Result<Vec<(String, String)>, String> {
    let merges = &vocabulary.merges;
    // Only where every token is a single byte, there is nothing to merge.
    let several = |(id, token): (usize, &String)| mergeable(vocabulary, id) && token.chars().nth(1).is_some();
    if merges.is_empty() && vocabulary.tokens.iter().enumerate().any(several) {
        return Err("tokenizer.ggml.merges is missing or empty".to_owned());
    }
    let mut pairs = Vec::with_capacity(merges.len());
    for (number, merge) in merges.iter().enumerate() {
        let (left, right) = merge
            .split_once(' ')
            .ok_or_else(|| format!("tokenizer.ggml.merges[{number}] is {merge:?}, expected two tokens"))?;
        let merged = format!("{left}{right}");
        if let Some(missing) = [left, right, &merged].into_iter().find(|token| !ids.contains_key(*token)) {
            return Err(format!(
                "tokenizer.ggml.merges[{number}] needs the token {missing:?}, which is not in the vocabulary"
            ));
        }
        pairs.push((left.to_owned(), right.to_owned()));
    }
    Ok(pairs)
}

/// `SentencePiece` merges whichever two neighbours make the token of the highest score. Written as a list of merges:
/// every way to split a token in two other tokens, best score first; among splits of equal score, the longer left
/// part first, then the longer right part, then the order of the ids (as transformers' converters sort them).
pub(super) fn from_scores(
    vocabulary: &GgufVocabulary,
    ids: &HashMap<&str, u32>,
) -> Result<Vec<(String, String)>, String> {
    if vocabulary.scores.len() != vocabulary.tokens.len() {
        return Err(
            "tokenizer.ggml.scores is missing; a `llama` tokenizer needs the score of every token".to_owned()
        );
    }
    let mut merges = Vec::new();
    for (id, (token, score)) in vocabulary.tokens.iter().zip(&vocabulary.scores).enumerate() {
        if token.len() > LONGEST_TOKEN {
            return Err(format!(
                "token {id} is {} bytes long, expected at most {LONGEST_TOKEN}",
                token.len()
            ));
        }
        if !mergeable(vocabulary, id) {
            continue;
        }
        let mut splits = Vec::new();
        for (length, (at, _)) in token.char_indices().enumerate().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right))
                && mergeable(vocabulary, l as usize)
                && mergeable(vocabulary, r as usize)
            {
                splits.push(((l, r), (*score, length, right.chars().count()), (left, right)));
            }
        }
        splits.sort_by_key(|(pair, ..)| *pair);
        merges.extend(splits.into_iter().map(|(_, rank, parts)| (rank, parts)));
    }
    // Stable, so that equal ranks stay in the order of the ids.
    merges.sort_by(|(a, _), (b, _)| b.0.total_cmp(&a.0).then(Reverse((a.1, a.2)).cmp(&Reverse((b.1, b.2)))));
    Ok(merges.into_iter().map(|(_, (left, right))| (left.to_owned(), right.to_owned())).collect())
}

/// Control, unknown, user-defined and byte tokens are never the result or the part of a merge.
fn mergeable(vocabulary: &GgufVocabulary, id: usize) -> bool {
    vocabulary.token_type(id) == NORMAL
}
