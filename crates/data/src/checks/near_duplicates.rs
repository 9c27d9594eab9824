//! Held-out rows that are, word for word, nearly rows to train on.
//!
//! Two rows are alike by the shingles they share, runs of three tokens (Broder 1997, "On the resemblance and
//! containment of documents"): shared ones over all. Shingles that many rows have, such as the template's, say
//! nothing and are left out.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use super::{Check, Finding, excerpt};
use crate::error::DataError;
use crate::example::ExampleView;
use crate::prepared::{PreparedDataset, Rows};
use crate::tokenizer::TextTokenizer;

/// Tokens of a shingle.
const SHINGLE: usize = 3;
/// Rows are alike where they share at least so much.
const ALIKE: f64 = 0.8;
/// Held-out rows that are looked at, evenly spread: memory is bound by them.
const MOST: usize = 4096;

/// The held-out rows, ready to be compared with.
struct HeldOut {
    /// Which rows have a shingle, by index into `rows`.
    having: HashMap<u64, Vec<usize>>,
    /// Number and shingles of each.
    rows: Vec<(usize, usize)>,
    /// Shingles that say nothing.
    common: HashSet<u64>,
}

pub(super) fn finding(data: &PreparedDataset, tokenizer: &TextTokenizer) -> Result<Finding, DataError> {
    let held_out = HeldOut::new(data);
    let mut finding = Finding::none(Check::NearDuplicates, held_out.rows.len());
    let nearest = held_out.nearest(&data.train);
    for (&(row, _), (alike, twin)) in held_out.rows.iter().zip(nearest) {
        if alike < ALIKE {
            continue;
        }
        let text = match data.validation.get(row) {
            Some(row) => tokenizer.decode(learned(row))?,
            None => String::new(),
        };
        finding.add(Some(data.train.len() + row), || {
            format!("{:.0} % the same as row {twin}: {}", alike * 100.0, excerpt(&text))
        });
    }
    Ok(finding)
}

/// From the first label on: the answer, where there is but one.
fn learned(row: ExampleView<'_>) -> &[u32] {
    let first = row.loss_mask.iter().position(|&label| label).unwrap_or(0);
    row.token_ids.get(first..).unwrap_or_default()
}

fn shingles(row: ExampleView<'_>) -> HashSet<u64> {
    let hash = |tokens: &[u32]| {
        let mut hasher = DefaultHasher::new();
        tokens.hash(&mut hasher);
        hasher.finish()
    };
    row.token_ids.windows(SHINGLE).map(hash).collect()
}

impl HeldOut {
    fn new(data: &PreparedDataset) -> Self {
        let held_out = data.validation.len();
        let mut having: HashMap<u64, Vec<usize>> = HashMap::new();
        let mut numbers = Vec::new();
        for index in 0..held_out.min(MOST) {
            let number = index * held_out / held_out.min(MOST);
            let Some(row) = data.validation.get(number) else { continue };
            for shingle in shingles(row) {
                having.entry(shingle).or_default().push(numbers.len());
            }
            numbers.push(number);
        }
        let common = common(&having, &data.train);
        let mut sizes = vec![0; numbers.len()];
        let telling = having.iter().filter(|(shingle, _)| !common.contains(shingle));
        for row in telling.flat_map(|(_, rows)| rows) {
            sizes.get_mut(*row).into_iter().for_each(|size| *size += 1);
        }
        Self { having, rows: numbers.into_iter().zip(sizes).collect(), common }
    }

    /// For each row, how alike the row to train on is that is most so, and which it is.
    fn nearest(&self, train: &Rows) -> Vec<(f64, usize)> {
        let mut nearest = vec![(0.0, 0); self.rows.len()];
        for (number, row) in train.iter().enumerate() {
            let mut shared: HashMap<usize, usize> = HashMap::new();
            let mut size = 0;
            for shingle in shingles(row).into_iter().filter(|shingle| !self.common.contains(shingle)) {
                size += 1;
                for &held_out in self.having.get(&shingle).into_iter().flatten() {
                    *shared.entry(held_out).or_default() += 1;
                }
            }
            for (held_out, shared) in shared {
                let all = size + self.rows.get(held_out).map_or(0, |row| row.1) - shared;
                let alike = shared as f64 / all as f64;
                if let Some(best) = nearest.get_mut(held_out).filter(|best| alike > best.0) {
                    *best = (alike, number);
                }
            }
        }
        nearest
    }
}

/// Of the shingles in `having`, those that more than one in a hundred rows of `train` have, and more than ten; or,
/// of few rows, more than half.
fn common(having: &HashMap<u64, Vec<usize>>, train: &Rows) -> HashSet<u64> {
    let mut rows_with: HashMap<u64, usize> = HashMap::new();
    for shingle in train.iter().flat_map(shingles).filter(|shingle| having.contains_key(shingle)) {
        *rows_with.entry(shingle).or_default() += 1;
    }
    let most = (train.len() / 100).max(10).min(train.len() / 2).max(1);
    rows_with.into_iter().filter(|&(_, rows)| rows > most).map(|(shingle, _)| shingle).collect()
}
