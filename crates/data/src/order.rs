//! Which row comes when.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

/// How an epoch goes through the rows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// Another order each epoch, from the seed.
    #[default]
    Shuffle,
    /// File order, each epoch.
    Sequential,
}

/// Rows that follow each other and appear equally often.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// How many there are.
    pub rows: usize,
    /// How often an epoch sees each, on average.
    pub weight: f64,
}

/// How often which rows appear in an epoch: the files' weights.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Mixture {
    parts: Vec<Part>,
}

impl Part {
    /// How often each row appears for certain, and how many rows once more.
    fn times(&self) -> (usize, usize) {
        let whole = self.weight.floor();
        (whole as usize, ((self.weight - whole) * self.rows as f64).round() as usize)
    }

    /// Rows of an epoch.
    fn epoch_rows(&self) -> usize {
        let (whole, more) = self.times();
        whole * self.rows + more
    }
}

impl Mixture {
    /// Parts that lie one behind the other.
    pub fn new(parts: Vec<Part>) -> Self {
        Self { parts }
    }

    /// Every one of `rows` rows once.
    pub fn once(rows: usize) -> Self {
        Self::new(vec![Part { rows, weight: 1.0 }])
    }

    /// The parts, in order.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// How many rows there are, each counted once.
    pub fn rows(&self) -> usize {
        self.parts.iter().map(|part| part.rows).sum()
    }

    /// How many rows an epoch sees, the same for every epoch.
    pub fn epoch_rows(&self) -> usize {
        self.parts.iter().map(Part::epoch_rows).sum()
    }

    /// The rows of one epoch, in file order. Where a weight leaves a fraction, the rows that come once more are the
    /// next ones of an order drawn from the seed, so that epochs of half a file see all of it in turn.
    fn rows_of(&self, seed: u64, epoch: u64) -> Vec<usize> {
        let mut rows = Vec::with_capacity(self.epoch_rows());
        let mut first = 0;
        for (number, part) in (0..).zip(&self.parts) {
            let (whole, more) = part.times();
            let mut times = vec![whole; part.rows];
            if more > 0 {
                let mut order: Vec<usize> = (0..part.rows).collect();
                shuffle(&mut order, *b"pronk file parts", seed, number);
                let skipped = (epoch % part.rows as u64) as usize * more % part.rows;
                for row in order.into_iter().cycle().skip(skipped).take(more) {
                    times.get_mut(row).into_iter().for_each(|times| *times += 1);
                }
            }
            rows.extend((first..).zip(times).flat_map(|(row, times)| std::iter::repeat_n(row, times)));
            first += part.rows;
        }
        rows
    }
}

/// The rows of `mixture` in the order of one epoch (0-based). The same call gives the same order on every machine,
/// whatever was drawn before: a resumed run goes on exactly where it was.
pub fn epoch_order(mixture: &Mixture, order: Order, seed: u64, epoch: u64) -> Vec<usize> {
    let mut indices = mixture.rows_of(seed, epoch);
    if order == Order::Shuffle {
        shuffle(&mut indices, *b"pronk epoch rows", seed, epoch);
    }
    indices
}

/// Fisher and Yates' shuffle, driven by `ChaCha8` with the key (`purpose`, `seed`, `counter`). It is written out here
/// because a crate's own shuffle may change with its version, and a run's data order may not.
pub(crate) fn shuffle<T>(items: &mut [T], purpose: [u8; 16], seed: u64, counter: u64) {
    let mut key = [0; 32];
    let (name, numbers) = key.split_at_mut(16);
    name.copy_from_slice(&purpose);
    for (byte, value) in numbers.iter_mut().zip(seed.to_le_bytes().into_iter().chain(counter.to_le_bytes())) {
        *byte = value;
    }
    let mut random = ChaCha8Rng::from_seed(key);
    for last in (1..items.len()).rev() {
        items.swap(last, below(&mut random, last as u64 + 1) as usize);
    }
}

/// A number in `0..bound` without bias: draws that would favour the small numbers are thrown away.
fn below(random: &mut ChaCha8Rng, bound: u64) -> u64 {
    let rejected = (u64::MAX % bound + 1) % bound; // 2^64 mod bound
    loop {
        let drawn = random.next_u64();
        if drawn <= u64::MAX - rejected {
            return drawn % bound;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(rows: usize, order: Order, seed: u64, epoch: u64) -> Vec<usize> {
        epoch_order(&Mixture::once(rows), order, seed, epoch)
    }

    #[test]
    fn weights_say_how_often_rows_come() {
        let part = |rows, weight| Part { rows, weight };
        let mixture = Mixture::new(vec![part(4, 2.0), part(3, 0.0), part(10, 1.3), part(6, 0.5)]);
        assert_eq!((mixture.rows(), mixture.epoch_rows()), (23, 8 + 13 + 3));
        let mut seen = [0; 23];
        for epoch in 0..10 {
            let rows = epoch_order(&mixture, Order::Sequential, 5, epoch);
            assert!(rows.is_sorted() && rows.len() == 24);
            assert_eq!(rows, epoch_order(&mixture, Order::Sequential, 5, epoch));
            let mut shuffled = epoch_order(&mixture, Order::Shuffle, 5, epoch);
            assert_ne!(shuffled, rows);
            shuffled.sort_unstable();
            assert_eq!(shuffled, rows);
            for row in rows {
                seen[row] += 1;
            }
        }
        // After ten epochs every row of a file has come equally often, whatever the fraction.
        assert_eq!(seen[..7], [20, 20, 20, 20, 0, 0, 0]);
        assert_eq!(seen[7..17], [13; 10]);
        assert_eq!(seen[17..], [5; 6]);
        let first = |seed| epoch_order(&mixture, Order::Sequential, seed, 0);
        assert_ne!(first(5), first(6), "which rows come once more is drawn from the seed");
    }

    #[test]
    fn sequential_is_file_order() {
        assert_eq!(of(4, Order::Sequential, 1, 2), [0, 1, 2, 3]);
        assert!(of(0, Order::Shuffle, 1, 2).is_empty());
        assert_eq!(of(1, Order::Shuffle, 1, 2), [0]);
    }

    #[test]
    fn an_epochs_order_is_a_permutation_that_depends_on_seed_and_epoch_alone() {
        let first = of(1000, Order::Shuffle, 7, 0);
        let _ = of(10, Order::Shuffle, 7, 0);
        assert_eq!(first, of(1000, Order::Shuffle, 7, 0));
        assert_ne!(first, of(1000, Order::Shuffle, 7, 1));
        assert_ne!(first, of(1000, Order::Shuffle, 8, 0));
        let mut sorted = first;
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..1000));
    }

    #[test]
    fn every_place_is_equally_likely() {
        // 6,000 shuffles of three rows: each of the six orders about 1,000 times (standard deviation 29).
        let mut counts = std::collections::BTreeMap::new();
        for epoch in 0..6000 {
            *counts.entry(of(3, Order::Shuffle, 0, epoch)).or_insert(0_u32) += 1;
        }
        assert_eq!(counts.len(), 6);
        assert!(counts.values().all(|&count| (850..1150).contains(&count)), "{counts:?}");
    }

    #[test]
    fn the_order_never_changes_between_versions() {
        assert_eq!(of(8, Order::Shuffle, 42, 3), [0, 2, 7, 4, 1, 3, 6, 5]);
    }

    #[test]
    fn named_in_lower_case() {
        assert_eq!(serde_json::to_string(&Order::Shuffle).unwrap(), "\"shuffle\"");
        assert_eq!(serde_json::from_str::<Order>("\"sequential\"").unwrap(), Order::Sequential);
        assert!(serde_json::from_str::<Order>("\"random\"").is_err());
    }
}
