//! Tokenizers that would make much of little: eight rules that each write sixteen letters for one make 4 GB of a
//! letter. What of them is refused when they are read, and what when a text is too much for them.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::Value;
use tokenizers::normalizers::Precompiled;
use tokenizers::{
    DecoderWrapper, NormalizedString, Normalizer, NormalizerWrapper, PreTokenizedString, PreTokenizerWrapper,
    Tokenizer,
};

/// What a text may grow to, in times its bytes. Unicode's tables make eleven bytes of one at most, byte-level spelling
/// makes two.
const TIMES: usize = 64;
/// What any text may grow to, in bytes.
const ANY: usize = 1 << 16;
/// How often a text may be spelled anew while it is cut into words. Once is usual, and each time may double it.
const SPELLINGS: usize = 4;
/// Characters that hold the longest one that a table of characters knows: it is given five bytes at a time.
const LONGEST_KEY: usize = 5;

/// `text`, its added tokens taken out and what is between them normalized; or why that would be too much.
pub(super) fn normalized(tokenizer: &Tokenizer, text: &str) -> Result<PreTokenizedString, String> {
    let added = tokenizer.get_added_vocabulary();
    let bounded = tokenizer.get_normalizer().map(|normalizer| Bounded::new(normalizer, text));
    let pieces = added.extract_and_normalize(bounded.as_ref(), text);
    match bounded.and_then(|bounded| bounded.failed.into_inner()) {
        Some(why) => Err(why),
        None => Ok(pieces),
    }
}

/// Looks at what a tokenizer does with any text, before it is given one.
pub(super) fn check(tokenizer: &Tokenizer) -> Result<(), String> {
    let spellings = tokenizer.get_pre_tokenizer().map_or(0, spellings);
    if spellings > SPELLINGS {
        return Err(format!(
            "its pre_tokenizer spells a text anew {spellings} times, expected at most {SPELLINGS}; take another tokenizer"
        ));
    }
    let times = tokenizer.get_decoder().map_or(1, times);
    if times > TIMES {
        return Err(format!(
            "its decoder may make {times} bytes of one, expected at most {TIMES}; take another tokenizer"
        ));
    }
    // The first text that it will be given.
    normalized(tokenizer, "a").map(|_| ())
}

/// Looks at the added tokens of a `tokenizer.json`, which are normalized while it is read.
pub(super) fn check_added(normalizer: &Value, added: &Value) -> Result<(), String> {
    // What is no normalizer, its reader will tell.
    let Ok(normalizer) = serde_json::from_value::<NormalizerWrapper>(normalizer.clone()) else {
        return Ok(());
    };
    let is_normalized = |token: &&Value| token.get("normalized").and_then(Value::as_bool) != Some(false);
    for token in added.as_array().into_iter().flatten().filter(is_normalized) {
        let text = token.get("content").and_then(Value::as_str).unwrap_or_default();
        Bounded::new(&normalizer, text)
            .normalize(&mut NormalizedString::from(text))
            .map_err(|why| format!("an added token of {} bytes: {why}", text.len()))?;
    }
    Ok(())
}

/// How often a text is spelled anew.
fn spellings(step: &PreTokenizerWrapper) -> usize {
    match step {
        PreTokenizerWrapper::Sequence(steps) => steps.as_ref().iter().map(spellings).sum(),
        PreTokenizerWrapper::ByteLevel(_) | PreTokenizerWrapper::Metaspace(_) => 1,
        _ => 0,
    }
}

/// How many bytes are made of one at most.
fn times(step: &DecoderWrapper) -> usize {
    match step {
        DecoderWrapper::Sequence(steps) => {
            steps.get_decoders().iter().map(times).fold(1, usize::saturating_mul)
        }
        // A pattern may match between two letters.
        DecoderWrapper::Replace(replace) => 1 + replace.content.len(),
        _ => 1,
    }
}

/// A normalizer that is walked step by step, for one text. The tokenizers crate drops its errors; so they stay here.
struct Bounded<'a> {
    normalizer: &'a NormalizerWrapper,
    most: usize,
    /// What of it the pieces before this one have left.
    left: AtomicUsize,
    failed: OnceLock<String>,
}

impl<'a> Bounded<'a> {
    fn new(normalizer: &'a NormalizerWrapper, text: &str) -> Self {
        let most = text.len().saturating_mul(TIMES).max(ANY);
        Self { normalizer, most, left: AtomicUsize::new(most), failed: OnceLock::new() }
    }

    fn walk(&self, step: &NormalizerWrapper, text: &mut NormalizedString) -> Result<(), String> {
        if let NormalizerWrapper::Sequence(steps) = step {
            return steps.as_ref().iter().try_for_each(|step| self.walk(step, text));
        }
        self.must_fit(most_of(step, text.get()))?;
        step.normalize(text).map_err(|error| error.to_string())?;
        self.must_fit(text.len())
    }

    fn must_fit(&self, bytes: usize) -> Result<(), String> {
        if bytes <= self.left.load(Ordering::Relaxed) {
            return Ok(());
        }
        Err(format!(
            "its normalizer would make more than {} bytes of it, the most that are let pass",
            self.most
        ))
    }
}

impl Normalizer for Bounded<'_> {
    fn normalize(&self, text: &mut NormalizedString) -> tokenizers::Result<()> {
        if let Some(why) = self.failed.get() {
            return Err(why.clone().into());
        }
        if let Err(why) = self.walk(self.normalizer, text) {
            return Err(self.failed.get_or_init(|| why).clone().into());
        }
        let left = self.left.load(Ordering::Relaxed);
        self.left.store(left.saturating_sub(text.len()), Ordering::Relaxed);
        Ok(())
    }
}

/// How long `text` may be after `step`, where it can be told before.
fn most_of(step: &NormalizerWrapper, text: &str) -> usize {
    let bytes = text.len();
    match step {
        // A pattern may match between two letters.
        NormalizerWrapper::Replace(step) => {
            bytes.saturating_add((bytes + 1).saturating_mul(step.content.len()))
        }
        NormalizerWrapper::Prepend(step) => bytes.saturating_add(step.prepend.len()),
        NormalizerWrapper::Precompiled(table) => most_by_table(table, text),
        _ => bytes,
    }
}

/// The same for a table of characters. It may know a character of several that stand together; then the first of them
/// is counted as all, and the others once more.
fn most_by_table(table: &Precompiled, text: &str) -> usize {
    let written = |(at, character): (usize, char)| {
        let rest = text.get(at..).unwrap_or_default();
        let end = rest.char_indices().nth(LONGEST_KEY).map_or(rest.len(), |(end, _)| end);
        let known = rest.get(..end).and_then(|rest| table.transform(rest));
        known.map_or(0, str::len).max(character.len_utf8())
    };
    text.char_indices().map(written).sum()
}
