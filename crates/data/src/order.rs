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

/// The rows `0..rows` in the order of one epoch (0-based). The same call gives the same order on every machine,
/// whatever was drawn before: a resumed run goes on exactly where it was.
pub fn epoch_order(rows: usize, order: Order, seed: u64, epoch: u64) -> Vec<usize> {
    let mut indices: Vec<usize> = (0..rows).collect();
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

    #[test]
    fn sequential_is_file_order() {
        assert_eq!(epoch_order(4, Order::Sequential, 1, 2), [0, 1, 2, 3]);
        assert!(epoch_order(0, Order::Shuffle, 1, 2).is_empty());
        assert_eq!(epoch_order(1, Order::Shuffle, 1, 2), [0]);
    }

    #[test]
    fn an_epochs_order_is_a_permutation_that_depends_on_seed_and_epoch_alone() {
        let first = epoch_order(1000, Order::Shuffle, 7, 0);
        let _ = epoch_order(10, Order::Shuffle, 7, 0);
        assert_eq!(first, epoch_order(1000, Order::Shuffle, 7, 0));
        assert_ne!(first, epoch_order(1000, Order::Shuffle, 7, 1));
        assert_ne!(first, epoch_order(1000, Order::Shuffle, 8, 0));
        let mut sorted = first;
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..1000));
    }

    #[test]
    fn every_place_is_equally_likely() {
        // 6,000 shuffles of three rows: each of the six orders about 1,000 times (standard deviation 29).
        let mut counts = std::collections::BTreeMap::new();
        for epoch in 0..6000 {
            *counts.entry(epoch_order(3, Order::Shuffle, 0, epoch)).or_insert(0_u32) += 1;
        }
        assert_eq!(counts.len(), 6);
        assert!(counts.values().all(|&count| (850..1150).contains(&count)), "{counts:?}");
    }

    #[test]
    fn the_order_never_changes_between_versions() {
        assert_eq!(epoch_order(8, Order::Shuffle, 42, 3), [0, 2, 7, 4, 1, 3, 6, 5]);
    }

    #[test]
    fn named_in_lower_case() {
        assert_eq!(serde_json::to_string(&Order::Shuffle).unwrap(), "\"shuffle\"");
        assert_eq!(serde_json::from_str::<Order>("\"sequential\"").unwrap(), Order::Sequential);
        assert!(serde_json::from_str::<Order>("\"random\"").is_err());
    }
}
