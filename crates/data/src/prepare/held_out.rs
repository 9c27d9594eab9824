//! Which rows are held out for evaluation.

use std::collections::{HashMap, HashSet};

use crate::order::shuffle;

/// The seed of the choice. Fixed, so that evaluation losses of two runs over the same data compare, whatever the
/// seed of training.
const SEED: u64 = 42;

/// `wanted` of the rows whose contents hash to `hashes`, by a shuffle of its own, the same at every call. Rows of the
/// same content are chosen together or not at all: what is trained on is not evaluated. Where they do not add up to
/// `wanted`, fewer.
pub(super) fn held_out(hashes: &[u64], wanted: usize) -> HashSet<usize> {
    let mut same: HashMap<u64, Vec<usize>> = HashMap::new();
    for (row, &hash) in hashes.iter().enumerate() {
        same.entry(hash).or_default().push(row);
    }
    let mut rows: Vec<usize> = (0..hashes.len()).collect();
    shuffle(&mut rows, *b"pronk  held  out", SEED, 0);
    let mut chosen = HashSet::new();
    for row in rows {
        if chosen.len() == wanted {
            break;
        }
        let group = hashes.get(row).and_then(|hash| same.get(hash));
        let group = group.filter(|group| !chosen.contains(&row) && chosen.len() + group.len() <= wanted);
        chosen.extend(group.into_iter().flatten());
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_choice_never_changes_between_versions() {
        let hashes: Vec<u64> = (0..20).collect();
        let mut rows: Vec<usize> = held_out(&hashes, 4).into_iter().collect();
        rows.sort_unstable();
        assert_eq!(rows, [0, 8, 9, 19]);
    }

    #[test]
    fn rows_of_one_content_stay_together() {
        // Every row twice but the first ten.
        let hashes: Vec<u64> = (0..10).chain((10..60).map(|row| 10 + row / 2)).collect();
        for wanted in 0..40 {
            let chosen = held_out(&hashes, wanted);
            assert_eq!(chosen.len(), wanted);
            let inside: HashSet<u64> = chosen.iter().map(|&row| hashes[row]).collect();
            let twins = (0..hashes.len()).filter(|row| inside.contains(&hashes[*row])).count();
            assert_eq!(twins, wanted, "none of them is on the other side");
        }
        assert_eq!(held_out(&[7; 9], 3).len(), 0);
        assert_eq!(held_out(&[1, 1, 2, 2, 3, 3], 3).len(), 2);
    }
}
