//! Rows laid end to end: a batch without a single padding token.

use std::cmp::Reverse;
use std::ops::Range;

use crate::example::ExampleView;

/// Some rows, concatenated. Every vector is `[tokens]`.
///
/// A token attends only to tokens of its own document (row), and its position counts from the document's start,
/// so that a row's loss does not depend on its neighbours.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PackedBatch {
    /// Token ids.
    pub token_ids: Vec<u32>,
    /// 0-based position of each token in its document.
    pub positions: Vec<u32>,
    /// 0-based number of each token's document; never falls.
    pub document_ids: Vec<u32>,
    /// Which tokens are labels; never the first of a document.
    pub loss_mask: Vec<bool>,
}

impl PackedBatch {
    /// Lays `examples` end to end, in order. An example without tokens leaves no trace but its document number.
    pub fn concat<'a, I>(examples: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<ExampleView<'a>>,
    {
        let mut batch = Self::default();
        for (document, example) in examples.into_iter().enumerate() {
            let example = example.into();
            batch.token_ids.extend(example.token_ids);
            batch.positions.extend(0..example.token_ids.len() as u32);
            batch.document_ids.resize(batch.token_ids.len(), document as u32);
            // The first token of a document has nothing before it to be predicted from.
            batch.loss_mask.extend(example.loss_mask.iter().enumerate().map(|(i, &label)| i > 0 && label));
            batch.loss_mask.resize(batch.token_ids.len(), false);
        }
        batch
    }

    /// How many tokens there are, all of them real.
    pub fn tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// How many tokens are labels.
    pub fn supervised(&self) -> usize {
        self.loss_mask.iter().filter(|&&label| label).count()
    }

    /// The token range of each document, in order.
    pub fn documents(&self) -> Vec<Range<usize>> {
        let mut start = 0;
        let chunks = self.document_ids.chunk_by(|a, b| a == b);
        chunks
            .map(|document| {
                let range = start..start + document.len();
                start = range.end;
                range
            })
            .collect()
    }

    /// The places where the loss looks: the hidden state at `positions[k]` is to predict `targets[k]`.
    ///
    /// For a label at token `i` the place is `i - 1`, in the same document. Both are `[supervised]`.
    pub fn labels(&self) -> (Vec<usize>, Vec<u32>) {
        let labels = self.loss_mask.iter().zip(&self.token_ids).enumerate().skip(1);
        labels.filter(|(_, (label, _))| **label).map(|(i, (_, token))| (i - 1, *token)).unzip()
    }
}

/// How the rows of an optimizer step are shared out among micro-batches. It decides how much memory
/// they take and how fast they go, never what they learn: the step's loss is that of all its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MicroBatches {
    /// So many tokens at most, whichever rows they are of. A row that is longer has one of its own.
    Packed {
        /// Tokens of a micro-batch.
        tokens: usize,
    },
    /// So many rows, of like length.
    Grouped {
        /// Rows of a micro-batch.
        rows: usize,
    },
}

impl MicroBatches {
    /// Shares out rows of these `lengths`: the indices of each micro-batch. Longest first, and
    /// equal ones in order, so that the same rows are always shared out the same way.
    pub fn share_out(self, lengths: &[usize]) -> Vec<Vec<usize>> {
        let mut longest_first: Vec<(usize, usize)> = lengths.iter().copied().enumerate().collect();
        longest_first.sort_by_key(|&(_, length)| Reverse(length));
        match self {
            Self::Packed { tokens } => best_fit(&longest_first, tokens),
            Self::Grouped { rows } => {
                let indices = |part: &[(usize, usize)]| part.iter().map(|&(index, _)| index).collect();
                longest_first.chunks(rows.max(1)).map(indices).collect()
            }
        }
    }
}

/// Best-fit decreasing (Johnson 1974): each row goes where it leaves the least room.
fn best_fit(longest_first: &[(usize, usize)], tokens: usize) -> Vec<Vec<usize>> {
    let mut batches: Vec<(usize, Vec<usize>)> = Vec::new(); // the room that is left, and the rows
    for &(index, length) in longest_first {
        let with_room = batches.iter_mut().filter(|(room, _)| *room >= length);
        match with_room.min_by_key(|(room, _)| *room) {
            Some((room, rows)) => {
                *room -= length;
                rows.push(index);
            }
            None => batches.push((tokens.saturating_sub(length), vec![index])),
        }
    }
    batches.into_iter().map(|(_, rows)| rows).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::example::TokenizedExample;

    fn example(ids: &[u32], first_label: usize) -> TokenizedExample {
        TokenizedExample {
            token_ids: ids.to_vec(),
            loss_mask: (0..ids.len()).map(|i| i >= first_label).collect(),
        }
    }

    #[test]
    fn rows_lie_end_to_end_and_labels_stay_inside_their_document() {
        let batch =
            PackedBatch::concat(&[example(&[5, 6, 7], 2), example(&[8, 9], 1), example(&[1, 2, 3, 4], 2)]);
        assert_eq!(batch.token_ids, [5, 6, 7, 8, 9, 1, 2, 3, 4]);
        assert_eq!(batch.positions, [0, 1, 2, 0, 1, 0, 1, 2, 3]);
        assert_eq!(batch.document_ids, [0, 0, 0, 1, 1, 2, 2, 2, 2]);
        assert_eq!(batch.documents(), [0..3, 3..5, 5..9]);
        assert_eq!(batch.tokens(), 9);
        assert_eq!(batch.supervised(), 4);
        let (positions, targets) = batch.labels();
        assert_eq!(positions, [1, 3, 6, 7]);
        assert_eq!(targets, [7, 9, 3, 4]);
        for (&position, &target) in positions.iter().zip(&targets) {
            assert_eq!(batch.document_ids[position], batch.document_ids[position + 1]);
            assert_eq!(batch.token_ids[position + 1], target);
        }
    }

    #[test]
    fn a_label_on_a_first_token_is_not_taken_for_the_previous_documents_last() {
        let batch = PackedBatch::concat(&[example(&[1, 2], 0), example(&[3, 4], 0)]);
        assert_eq!(batch.loss_mask, [false, true, false, true]);
        assert_eq!(batch.labels(), (vec![0, 2], vec![2, 4]));
    }

    #[test]
    fn packing_fills_micro_batches_and_loses_no_row() {
        let lengths = [30, 70, 20, 50, 50, 120, 80, 70];
        let packed = MicroBatches::Packed { tokens: 100 }.share_out(&lengths);
        // 120 is too long for any; 80 + 20, 70 + 30, 70, 50 + 50: as few as can be.
        assert_eq!(packed, [vec![5], vec![6, 2], vec![1, 0], vec![7], vec![3, 4]]);
        let wide = MicroBatches::Packed { tokens: 1000 }.share_out(&lengths);
        assert_eq!(wide, [[5, 6, 1, 7, 3, 4, 0, 2]]);
        assert!(MicroBatches::Packed { tokens: 100 }.share_out(&[]).is_empty());
    }

    #[test]
    fn grouping_puts_like_lengths_together() {
        let grouped = MicroBatches::Grouped { rows: 2 }.share_out(&[5, 90, 6, 91, 7]);
        assert_eq!(grouped, [vec![3, 1], vec![4, 2], vec![0]]);
    }

    #[test]
    fn nothing_and_mismatched_masks_do_no_harm() {
        let none: [TokenizedExample; 0] = [];
        let batch = PackedBatch::concat(&none);
        assert_eq!((batch.tokens(), batch.documents().len(), batch.labels().0.len()), (0, 0, 0));
        let short = TokenizedExample { token_ids: vec![1, 2, 3], loss_mask: vec![false, true] };
        let batch = PackedBatch::concat(&[short]);
        assert_eq!(batch.loss_mask, [false, true, false]);
    }
}
