//! What preparing a dataset found and did; stored beside the rows it speaks of.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::example::{DropReason, ExampleView};
use crate::record::{Origin, RecordFormat};

/// The smallest bucket of the length histogram, in tokens.
const FIRST_BUCKET: usize = 32;

/// How many dropped records of a kind are named.
const LISTED: usize = 5;

/// The sums of a preparation. Rows and tokens count training and held-out rows together unless named otherwise.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PrepareReport {
    /// The data files, in the order given.
    pub files: Vec<FileReport>,
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
    /// Where the first of them stand.
    #[serde(default)]
    pub first_dropped: BTreeMap<DropReason, Vec<String>>,
    /// What the template writes around what is said, and no answer should: lines that mark who speaks.
    #[serde(default)]
    pub template_markers: Vec<String>,
    /// Records that equal an earlier one in all that is used of them. They are kept.
    pub duplicates: usize,
    /// Records with an answer that is empty or white space, which teaches only to stop. They are kept.
    pub empty_outputs: usize,
    /// Fields beside those that are used, with the number of records that have them.
    pub ignored_fields: BTreeMap<String, usize>,
    /// Rows by length, in rising order: up to 32 tokens, 33 to 64, 65 to 128, ..; from the first to the longest.
    pub length_histogram: Vec<LengthBucket>,
    /// Tokens of the longest row.
    pub longest: usize,
    /// The highest token id, to be checked against a model's `vocab_size`.
    pub max_token_id: Option<u32>,
}

/// What a data file held.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FileReport {
    /// As given.
    pub path: String,
    /// How its records are written.
    pub format: RecordFormat,
    /// Records read, bad ones included.
    pub records: usize,
    /// How often an epoch sees its rows.
    pub weight: f64,
}

impl std::fmt::Display for FileReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}, {} records", self.path, self.format, thousands(self.records))?;
        if (self.weight - 1.0).abs() > f64::EPSILON { write!(f, ", weight {}", self.weight) } else { Ok(()) }
    }
}

/// 1234567 as 1,234,567.
fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
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

    /// Counts a record that gives no row.
    pub(crate) fn count_dropped(&mut self, reason: DropReason, origin: &Origin) {
        *self.dropped.entry(reason).or_default() += 1;
        let first = self.first_dropped.entry(reason).or_default();
        if first.len() < LISTED {
            first.push(origin.to_string());
        }
    }

    /// Counts a row.
    pub(crate) fn count_row(&mut self, row: ExampleView<'_>) {
        let tokens = row.tokens();
        self.max_token_id = self.max_token_id.max(row.token_ids.iter().copied().max());
        self.tokens += tokens;
        self.supervised_tokens += row.supervised();
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
    use crate::example::TokenizedExample;

    /// A row of which all tokens but the first are labels.
    fn row(tokens: usize) -> TokenizedExample {
        let token_ids = (0..tokens as u32).collect();
        TokenizedExample { token_ids, loss_mask: (0..tokens).map(|i| i > 0).collect() }
    }

    #[test]
    fn lengths_fall_into_powers_of_two() {
        let mut report = PrepareReport::default();
        for tokens in [1, 32, 33, 300, 256, 257] {
            report.count_row(row(tokens).view());
        }
        let bars: Vec<_> = report.length_histogram.iter().map(|b| (b.up_to, b.rows)).collect();
        assert_eq!(bars, [(32, 2), (64, 1), (128, 0), (256, 1), (512, 2)]);
        assert_eq!((report.longest, report.tokens, report.supervised_tokens), (300, 879, 873));
    }

    #[test]
    fn survives_json() {
        let file = FileReport {
            path: "a.json".into(),
            format: RecordFormat::ShareGpt,
            records: 1_234_567,
            weight: 1.0,
        };
        assert_eq!(file.to_string(), "a.json: ShareGPT, 1,234,567 records");
        let half = FileReport { weight: 0.5, records: 12, ..file.clone() };
        assert_eq!(half.to_string(), "a.json: ShareGPT, 12 records, weight 0.5");
        let mut report = PrepareReport { files: vec![file], ..Default::default() };
        report.dropped.insert(DropReason::AnswerCutAway, 3);
        report.ignored_fields.insert("category".into(), 2);
        report.count_row(row(40).view());
        assert_eq!(report.max_token_id, Some(39));
        let text = serde_json::to_string(&report).unwrap();
        assert!(text.contains("\"answer_cut_away\":3"), "{text}");
        assert_eq!(serde_json::from_str::<PrepareReport>(&text).unwrap(), report);
        assert_eq!(report.dropped_rows(), 3);
    }
}
