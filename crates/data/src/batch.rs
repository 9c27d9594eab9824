//! Rows laid end to end: a batch without a single padding token.

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
    fn nothing_and_mismatched_masks_do_no_harm() {
        let none: [TokenizedExample; 0] = [];
        let batch = PackedBatch::concat(&none);
        assert_eq!((batch.tokens(), batch.documents().len(), batch.labels().0.len()), (0, 0, 0));
        let short = TokenizedExample { token_ids: vec![1, 2, 3], loss_mask: vec![false, true] };
        let batch = PackedBatch::concat(&[short]);
        assert_eq!(batch.loss_mask, [false, true, false]);
    }
}
