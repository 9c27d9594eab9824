//! What shows in one row, or in the answers of all.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::{Check, Finding, excerpt, mojibake};
use crate::error::DataError;
use crate::example::{DropReason, ExampleView};
use crate::prepared::PreparedDataset;
use crate::tokenizer::TextTokenizer;

/// An answer is given by too many rows where it is by more than this share of them ..
const REPEATED: f64 = 0.01;
/// .. and by more than so many.
const TWINS: usize = 10;

/// Words that stand where there is no answer. With a full stop they are one.
const NOTHING: [&str; 3] = ["n/a", "none", "null"];

/// Rows that are looked at one by one.
struct Looking<'a> {
    tokenizer: &'a TextTokenizer,
    control: HashMap<u32, String>,
    bos: Option<u32>,
    markers: &'a [String],
    max_seq_len: usize,
    found: Vec<Finding>,
    /// By the token ids of an answer: how many rows give it, and the first that does.
    answers: HashMap<Vec<u32>, (usize, usize)>,
    /// Of these, the words for nothing.
    words: HashSet<Vec<u32>>,
}

/// All findings but those that take two rows.
pub(super) fn findings(data: &PreparedDataset, tokenizer: &TextTokenizer) -> Result<Vec<Finding>, DataError> {
    let rows = data.train.len() + data.validation.len();
    let checks = Check::ALL.into_iter().filter(|&check| check != Check::NearDuplicates);
    let named = |name: &str| tokenizer.special_tokens().into_iter().find(|(key, _)| key == name);
    let bos = tokenizer.bos().or_else(|| tokenizer.token_id(&named("bos_token")?.1));
    let mut looking = Looking {
        tokenizer,
        control: tokenizer.control_tokens(),
        bos,
        markers: &data.report.template_markers,
        max_seq_len: data.max_seq_len,
        found: checks.map(|check| Finding::none(check, rows + data.report.dropped_rows())).collect(),
        answers: HashMap::new(),
        words: HashSet::new(),
    };
    for (number, row) in data.train.iter().chain(data.validation.iter()).enumerate() {
        looking.ends(number, row);
        looking.answers(number, row)?;
        looking.text(number, row)?;
    }
    looking.dropped(data);
    looking.one_answer(rows)?;
    Ok(looking.found)
}

impl Looking<'_> {
    fn add(&mut self, check: Check, row: Option<usize>, what: impl FnOnce() -> String) {
        if let Some(finding) = self.found.iter_mut().find(|finding| finding.check == check) {
            finding.add(row, what);
        }
    }

    fn is_eos(&self, id: u32) -> bool {
        self.tokenizer.eos_ids().contains(&id)
    }

    /// How the row begins and ends.
    fn ends(&mut self, number: usize, row: ExampleView<'_>) {
        let ends = row.token_ids.last().is_some_and(|&id| self.is_eos(id));
        let learned = row.loss_mask.last() == Some(&true);
        if !ends && row.tokens() >= self.max_seq_len {
            let most = self.max_seq_len;
            self.add(Check::AnswersCutAway, Some(number), || format!("cut off after {most} tokens"));
        } else if !(ends && learned) {
            let what = if ends { "its EOS is not learned" } else { "it ends without EOS" };
            self.add(Check::EosAbsent, Some(number), || what.to_owned());
        }
        if let [first, second, ..] = row.token_ids
            && first == second
            && Some(*first) == self.bos
        {
            let bos = self.tokenizer.token(*first).unwrap_or_default();
            self.add(Check::DoubleBos, Some(number), || format!("it begins {bos}{bos}"));
        }
    }

    /// What the row teaches to say.
    fn answers(&mut self, number: usize, row: ExampleView<'_>) -> Result<(), DataError> {
        let answers = answers(row);
        if !row.loss_mask.contains(&true) {
            self.add(Check::NothingToLearn, Some(number), || "no token of it is a label".to_owned());
        }
        // A text without a prompt has no answer that could be told from it.
        if answers.first().is_some_and(|first| first.start <= 1) {
            return Ok(());
        }
        for answer in answers {
            let ids = row.token_ids.get(answer).unwrap_or_default();
            let said = self.said(ids)?;
            let text = self.tokenizer.decode(said)?;
            if says_nothing(&text) {
                self.add(Check::EmptyOutputs, Some(number), || format!("the answer is {text:?}"));
                continue;
            }
            if is_a_word_for_nothing(&text) {
                self.words.insert(said.to_vec());
            }
            let token = said.iter().find_map(|id| self.control.get(id));
            let marker = token.or_else(|| self.markers.iter().find(|marker| text.contains(marker.as_str())));
            if let Some(marker) = marker.cloned() {
                self.add(Check::TemplateMarkers, Some(number), || format!("the answer holds {marker:?}"));
            }
            self.answers.entry(said.to_vec()).or_insert((0, number)).0 += 1;
        }
        Ok(())
    }

    /// An answer without the tokens that end it, and the white space among them.
    fn said<'a>(&self, mut ids: &'a [u32]) -> Result<&'a [u32], DataError> {
        while let Some((&last, rest)) = ids.split_last() {
            let ends = self.control.contains_key(&last) || self.is_eos(last);
            if !ends && !self.tokenizer.decode(&[last])?.trim().is_empty() {
                break;
            }
            ids = rest;
        }
        Ok(ids)
    }

    fn text(&mut self, number: usize, row: ExampleView<'_>) -> Result<(), DataError> {
        let text = self.tokenizer.decode(row.token_ids)?;
        // Where a row is cut off, so may be a character.
        if let Some(found) = mojibake::find(text.trim_end_matches('\u{fffd}')) {
            self.add(Check::Mojibake, Some(number), || format!("{found:?} in {}", around(&text, &found)));
        }
        Ok(())
    }

    /// Records that gave no row.
    fn dropped(&mut self, data: &PreparedDataset) {
        for (&reason, &count) in &data.report.dropped {
            let check = match reason {
                DropReason::AnswerCutAway => Check::AnswersCutAway,
                DropReason::NothingToPredict => Check::NothingToLearn,
            };
            let mut places = data.report.first_dropped.get(&reason).into_iter().flatten();
            for _ in 0..count {
                let place = places.next().cloned().unwrap_or_default();
                self.add(check, None, || format!("{place}: dropped, {reason}"));
            }
        }
    }

    fn one_answer(&mut self, rows: usize) -> Result<(), DataError> {
        let most = TWINS.max((rows as f64 * REPEATED) as usize);
        let mut repeated: Vec<(Vec<u32>, usize, usize)> = Vec::new();
        for (ids, (count, first)) in std::mem::take(&mut self.answers) {
            if count > most {
                repeated.push((ids, count, first));
            } else if self.words.contains(&ids) {
                // A word that many rows give is a label of theirs.
                let answer = excerpt(&self.tokenizer.decode(&ids)?);
                self.add_rows(Check::EmptyOutputs, first, count, || format!("the answer is {answer}"));
            }
        }
        repeated.sort_by_key(|&(_, count, first)| (std::cmp::Reverse(count), first));
        for (ids, count, first) in repeated {
            let answer = excerpt(&self.tokenizer.decode(&ids)?);
            let what = || format!("{count} rows give the answer {answer}");
            self.add_rows(Check::OneAnswer, first, count, what);
        }
        Ok(())
    }

    /// So many rows, of which the first is told.
    fn add_rows(&mut self, check: Check, first: usize, count: usize, what: impl FnOnce() -> String) {
        self.add(check, Some(first), what);
        if let Some(finding) = self.found.iter_mut().find(|finding| finding.check == check) {
            finding.count += count - 1;
        }
    }
}

/// Whether an answer is one of [`NOTHING`], perhaps in brackets.
fn is_a_word_for_nothing(text: &str) -> bool {
    let bare = text.trim().trim_matches(|c| "<>[](){}\"'`".contains(c)).trim();
    NOTHING.iter().any(|word| bare.eq_ignore_ascii_case(word))
}

/// Whether an answer is none: white space, dots, or "no output".
fn says_nothing(text: &str) -> bool {
    let letters: String = text.chars().filter(|c| c.is_alphanumeric()).collect();
    let dots = |text: &str| !text.is_empty() && text.chars().all(|c| ".…".contains(c));
    text.trim().is_empty() || dots(text.trim()) || letters.eq_ignore_ascii_case("nooutput")
}

/// The runs of an answer's labels.
fn answers(row: ExampleView<'_>) -> Vec<Range<usize>> {
    let mut start = 0;
    let runs = row.answers.chunk_by(|a, b| a == b).filter_map(|run| {
        let range = start..start + run.len();
        start = range.end;
        run.first().is_some_and(|&label| label).then_some(range)
    });
    runs.collect()
}

/// `text` around the first `found` in it.
fn around(text: &str, found: &str) -> String {
    let at = text.find(found).map_or(0, |bytes| text.get(..bytes).unwrap_or_default().chars().count());
    excerpt(&text.chars().skip(at.saturating_sub(20)).collect::<String>())
}
