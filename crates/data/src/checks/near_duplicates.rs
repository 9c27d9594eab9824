//! Held-out rows that are, word for word, nearly rows to train on.
//!
//! Two rows are alike by the shingles of their own that they share: shared ones over all. Those that nearly every row
//! has are the data's form and say nothing. That many rows have one says no more than that, though: of forty rows that
//! are nearly one, those held out are what is looked for.
//!
//! Not every two rows are compared. Rows that share two thirds of all share one of the rarest third of each (Bayardo
//! et al. 2007, "Scaling up all pairs similarity search").

use std::cmp::Ordering;
use std::collections::HashMap;

use super::shingles::{FEW, FORM, SHARE, Shingles};
use super::{Check, Finding, excerpt};
use crate::error::DataError;
use crate::example::ExampleView;
use crate::prepared::PreparedDataset;
use crate::tokenizer::TextTokenizer;

/// Rows are alike where they share at least so much, in percent: of an answer of a dozen words, all but one. Of Alpaca's
/// rows no two share more than a quarter; of its bytes, a half.
const ALIKE: usize = 65;
/// And so much of their prompts: records whose answers have one form are no twins for that.
const PROMPTS_ALIKE: usize = 50;
/// Held-out rows that are looked at, evenly spread: memory is bound by them.
const MOST: usize = 4096;
/// Rows that a held-out row is compared with for nothing but what many rows have. Of rows that are many times the same the
/// first will do.
const TRIES: usize = 1000;

/// A row's number and its shingles, in order.
type Row = (usize, Vec<u64>);

pub(super) fn finding(data: &PreparedDataset, tokenizer: &TextTokenizer) -> Result<Finding, DataError> {
    let (train, held_out) = (data.train.len(), data.validation.len());
    let shingles = Shingles::new(data);
    let looked_at = held_out.min(MOST);
    let numbers = (0..looked_at).map(|index| index * held_out / looked_at);
    let rows: Vec<Row> = numbers.map(|number| (number, shingles.of(train + number))).collect();
    let counts = Counts::new(&rows, train, &shingles);
    let rows: Vec<Row> = rows.into_iter().map(|(number, own)| (number, counts.telling(own))).collect();
    let mut finding = Finding::none(Check::NearDuplicates, rows.len());
    for (&(row, _), twin) in rows.iter().zip(twins(&rows, train, &shingles, &counts)) {
        let Some((alike, twin)) = twin else { continue };
        let text = match data.validation.get(row) {
            Some(row) => tokenizer.decode(answer(row))?,
            None => String::new(),
        };
        finding.add(Some(train + row), || format!("{alike} % the same as row {twin}: {}", excerpt(&text)));
    }
    Ok(finding)
}

/// From the first answer on: all of it, where there is but one.
fn answer(row: ExampleView<'_>) -> &[u32] {
    let first = row.answers.iter().position(|&answer| answer).unwrap_or(0);
    row.token_ids.get(first..).unwrap_or_default()
}

/// Of each held-out row, one to train on that it is alike, if there is any, and how much.
fn twins(
    held_out: &[Row],
    train: usize,
    shingles: &Shingles<'_>,
    counts: &Counts,
) -> Vec<Option<(usize, usize)>> {
    let mut twins = vec![None; held_out.len()];
    let mut tries = vec![0; held_out.len()];
    let mut having: HashMap<u64, Vec<usize>> = HashMap::new();
    for (index, (_, own)) in held_out.iter().enumerate() {
        for shingle in counts.rarest(own) {
            having.entry(shingle).or_default().push(index);
        }
    }
    for number in 0..train {
        let own = counts.telling(shingles.of(number));
        // With whether it is for what many rows have alone.
        let mut near: Vec<(usize, bool)> = Vec::new();
        for shingle in counts.rarest(&own) {
            let Some(rows) = having.get_mut(&shingle) else { continue };
            let frequent = counts.is_frequent(shingle);
            // One twin is enough; so rows that are all nearly one are not all compared with each other.
            rows.retain(|&row| {
                twins.get(row) == Some(&None) && !(frequent && tries.get(row) >= Some(&TRIES))
            });
            near.extend(rows.iter().map(|&row| (row, frequent)));
        }
        near.sort_unstable();
        near.dedup_by_key(|(row, _)| *row);
        for (row, frequent) in near {
            let Some((held, other)) = held_out.get(row) else { continue };
            let alike = alike(&own, other);
            let is_twin = alike >= ALIKE && prompts_alike(shingles, train + held, number);
            if let Some(twin) = twins.get_mut(row).filter(|_| is_twin) {
                *twin = Some((alike, number));
            } else if let Some(tries) = tries.get_mut(row) {
                *tries += usize::from(frequent);
            }
        }
    }
    twins
}

/// Whether two rows ask nearly the same, as far as they ask. That many others ask so too is no matter.
fn prompts_alike(shingles: &Shingles<'_>, a: usize, b: usize) -> bool {
    let [a, b] = [a, b].map(|number| shingles.of_prompt(number));
    (a.is_empty() && b.is_empty()) || alike(&a, &b) >= PROMPTS_ALIKE
}

/// How many rows have a shingle, of those that a held-out row has.
struct Counts {
    having: HashMap<u64, usize>,
    /// Rows in all.
    rows: usize,
}

impl Counts {
    fn new(held_out: &[Row], train: usize, shingles: &Shingles<'_>) -> Self {
        let mut having: HashMap<u64, usize> = HashMap::new();
        for &shingle in held_out.iter().flat_map(|(_, own)| own) {
            *having.entry(shingle).or_default() += 1;
        }
        for shingle in (0..train).flat_map(|number| shingles.of(number)) {
            having.entry(shingle).and_modify(|rows| *rows += 1);
        }
        Self { having, rows: train + held_out.len() }
    }

    fn of(&self, shingle: u64) -> usize {
        self.having.get(&shingle).copied().unwrap_or(0)
    }

    /// Whether more rows have it than a few.
    fn is_frequent(&self, shingle: u64) -> bool {
        self.of(shingle) > FEW.max(self.rows / SHARE)
    }

    /// A row's shingles without the data's form.
    fn telling(&self, mut own: Vec<u64>) -> Vec<u64> {
        own.retain(|&shingle| {
            let rows = self.of(shingle);
            rows <= FEW || 100 * rows <= FORM * self.rows
        });
        own
    }

    /// Of a row's shingles, so many that rows which are alike have one of them in common.
    fn rarest(&self, own: &[u64]) -> Vec<u64> {
        let mut rarest: Vec<(usize, u64)> = own.iter().map(|&shingle| (self.of(shingle), shingle)).collect();
        rarest.sort_unstable();
        rarest.truncate(own.len() - (own.len() * ALIKE).div_ceil(100) + 1);
        rarest.into_iter().map(|(_, shingle)| shingle).collect()
    }
}

/// How many of the shingles of two rows, which stand in order, both have: in percent of all.
fn alike(a: &[u64], b: &[u64]) -> usize {
    let (mut left, mut right) = (a.iter().peekable(), b.iter().peekable());
    let mut shared = 0;
    while let (Some(first), Some(second)) = (left.peek(), right.peek()) {
        let order = first.cmp(second);
        shared += usize::from(order == Ordering::Equal);
        if order != Ordering::Greater {
            left.next();
        }
        if order != Ordering::Less {
            right.next();
        }
    }
    100 * shared / (a.len() + b.len() - shared).max(1)
}
