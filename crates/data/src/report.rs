//! What preparing a dataset found and did; stored beside the rows it speaks of.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::example::DropReason;

/// The smallest bucket of the length histogram, in tokens.
const FIRST_BUCKET: usize = 32;

/// The sums of a preparation. Rows and tokens count training and held-out rows together unless named otherwise.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrepareReport {
    /// The data files, as given.
    pub files: Vec<String>,
    /// The base whose tokenizer was used, as its user can name it again; `None` where nobody said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Records read, bad ones included.
    pub records: usize,
    /// Bad records left out, with `skip_bad`.
    pub bad_records: usize,
    /// Rows to train on.
    pub train_rows: usize,
    /// Rows held out.
    pub validation_rows: usize,
    /// Tokens of all rows.
    pub tokens: usize,
    /// Tokens among them that are labels.
    pub supervised_tokens: usize,
    /// Rows whose end was cut off at `max_seq_len`.
    pub truncated: usize,
    /// Records that gave no row, by reason.
    pub dropped: BTreeMap<DropReason, usize>,
    /// Records that equal an earlier one in instruction, input and output. They are kept.
    pub duplicates: usize,
    /// Records whose output is empty or white space, which teach only to stop. They are kept.
    pub empty_outputs: usize,
    /// Fields beside instruction, input and output, with the number of records that have them.
    pub ignored_fields: BTreeMap<String, usize>,
    /// Rows by length, in rising order: up to 32 tokens, 33 to 64, 65 to 128, ..; from the first to the longest.
    pub length_histogram: Vec<LengthBucket>,
    /// Tokens of the longest row.
    pub longest: usize,
}

/// One bar of the length histogram.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LengthBucket {
    /// The longest row that still belongs here, in tokens; a power of two.
    pub up_to: usize,
    /// How many rows belong here.
    pub rows: usize,
}

impl PrepareReport {
    /// Records that gave no row, whatever the reason.
    pub fn dropped_rows(&self) -> usize {
        self.dropped.values().sum()
    }

    /// Counts a row of `tokens` tokens, `supervised` of them labels.
    pub(crate) fn count_row(&mut self, tokens: usize, supervised: usize) {
        self.tokens += tokens;
        self.supervised_tokens += supervised;
        self.longest = self.longest.max(tokens);
        let mut up_to = self.length_histogram.last().map_or(FIRST_BUCKET, |bucket| bucket.up_to * 2);
        while self.length_histogram.last().is_none_or(|bucket| bucket.up_to < tokens) {
            self.length_histogram.push(LengthBucket { up_to, rows: 0 });
            up_to *= 2;
        }
        if let Some(bucket) = self.length_histogram.iter_mut().find(|bucket| tokens <= bucket.up_to) {
            bucket.rows += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_fall_into_powers_of_two() {
        let mut report = PrepareReport::default();
        for tokens in [1, 32, 33, 300, 256, 257] {
            report.count_row(tokens, tokens - 1);
        }
        let bars: Vec<_> = report.length_histogram.iter().map(|b| (b.up_to, b.rows)).collect();
        assert_eq!(bars, [(32, 2), (64, 1), (128, 0), (256, 1), (512, 2)]);
        assert_eq!((report.longest, report.tokens, report.supervised_tokens), (300, 879, 873));
    }

    #[test]
    fn survives_json() {
        let mut report = PrepareReport { files: vec!["a.json".into()], ..Default::default() };
        report.dropped.insert(DropReason::AnswerCutAway, 3);
        report.ignored_fields.insert("category".into(), 2);
        report.count_row(40, 7);
        let text = serde_json::to_string(&report).unwrap();
        assert!(text.contains("\"answer_cut_away\":3"), "{text}");
        assert_eq!(serde_json::from_str::<PrepareReport>(&text).unwrap(), report);
        assert_eq!(report.dropped_rows(), 3);
    }
}
