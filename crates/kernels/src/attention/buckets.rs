//! Spans that are computed together: those of about one length are padded to the longest of them.

use std::collections::BTreeMap;
use std::ops::Range;

use super::Span;

/// Queries that a long span is cut into; every piece looks at the keys of those before it too.
const QUERIES: usize = 512;
/// Scores of a bucket, over all heads: 256 MB of them.
const SCORES: usize = 1 << 26;
/// Lengths of padded rows are multiples of it, so that units read whole vectors.
const ALIGNED: usize = 8;

/// Where queries, and the keys that the last of them sees, begin, and how many there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Rows of the queries.
    pub queries: [usize; 2],
    /// Rows of the keys.
    pub keys: [usize; 2],
}

/// Pieces of about one size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bucket {
    /// Queries of each, padded.
    pub queries: usize,
    /// Keys of each, padded.
    pub keys: usize,
    /// The pieces. No two are of one span.
    pub pieces: Vec<Piece>,
}

/// Bytes beside keys and values that attention on a card takes at a time, at most, going backwards: of a bucket's
/// scores their products and the gradients at the weights in float32, and the weights and slopes that are multiplied,
/// in 16 bits. `pairs` are those of tokens of one record, over so many query heads.
pub fn attention_bytes_on_card(heads: usize, pairs: usize) -> usize {
    let longest = pairs.isqrt();
    // Padding less than doubles queries, and keys.
    let scores = (4 * heads * pairs).min(SCORES.max(heads * QUERIES * longest));
    scores * (2 * size_of::<f32>() + 2 * size_of::<u16>())
}

/// All of `spans`, for so many query heads.
pub fn buckets(spans: &[Span], heads: usize) -> Vec<Bucket> {
    let mut classes: BTreeMap<[usize; 2], Vec<Piece>> = BTreeMap::new();
    for piece in spans.iter().flat_map(pieces) {
        classes.entry([class(piece.queries[1]), class(piece.keys[1])]).or_default().push(piece);
    }
    let full = classes.into_values().flat_map(|pieces| {
        let longest = |length: fn(&Piece) -> usize| {
            pieces.iter().map(length).max().unwrap_or(0).next_multiple_of(ALIGNED)
        };
        let (queries, keys) = (longest(|piece| piece.queries[1]), longest(|piece| piece.keys[1]));
        let together = (SCORES / (heads * queries * keys).max(1)).max(1);
        let chunks: Vec<_> = pieces.chunks(together).map(<[_]>::to_vec).collect();
        chunks.into_iter().map(move |pieces| Bucket { queries, keys, pieces })
    });
    full.collect()
}

/// A span, no more than so many queries at a time.
fn pieces(span: &Span) -> impl Iterator<Item = Piece> {
    let Span { queries, keys }: Span = span.clone();
    let Range { start, end } = queries;
    (start..end).step_by(QUERIES).map(move |first| {
        let last = end.min(first + QUERIES);
        Piece { queries: [first, last - first], keys: [keys.start, keys.len() - (end - last)] }
    })
}

/// The longest of a class is less than twice the shortest, or by less than a piece's queries longer: pieces of one span
/// never meet.
fn class(length: usize) -> usize {
    if length <= QUERIES { length.next_power_of_two() } else { length.next_multiple_of(QUERIES) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_of_about_one_length_come_together() {
        let spans = [Span::document(0..100), Span::document(100..120), Span::document(120..240)];
        let buckets = buckets(&spans, 2);
        let sizes: Vec<_> = buckets.iter().map(|b| (b.queries, b.keys, b.pieces.len())).collect();
        assert_eq!(sizes, [(24, 24, 1), (120, 120, 2)]);
        assert_eq!(buckets[1].pieces[1], Piece { queries: [120, 120], keys: [120, 120] });
    }

    #[test]
    fn a_long_span_is_cut_and_no_two_pieces_of_it_come_together() {
        let spans = [Span { queries: 7..2007, keys: 1..2101 }];
        let buckets = buckets(&spans, 1);
        assert!(buckets.iter().all(|bucket| bucket.pieces.len() == 1));
        let pieces: Vec<_> = buckets.iter().map(|bucket| bucket.pieces[0]).collect();
        let mut queries: Vec<_> = pieces.iter().map(|piece| piece.queries).collect();
        queries.sort_unstable();
        assert_eq!(queries, [[7, 512], [519, 512], [1031, 512], [1543, 464]]);
        // 100 keys are there before the first query.
        assert!(pieces.iter().all(|p| p.keys == [1, p.queries[0] + p.queries[1] - 7 + 100]));
    }

    #[test]
    fn no_bucket_takes_more_than_is_told() {
        let mut uneven = vec![129; 15];
        uneven.push(256);
        for lengths in [vec![100; 20], vec![2000], vec![33, 500, 64, 7], uneven] {
            let mut end = 0;
            let spans: Vec<_> =
                lengths.iter().map(|n| (end..end + n, end += n).0).map(Span::document).collect();
            let pairs = lengths.iter().map(|n| n * n).sum();
            let scores = |b: &Bucket| 32 * b.pieces.len() * b.queries * b.keys;
            let most = buckets(&spans, 32).iter().map(scores).max().unwrap_or(0);
            assert!(12 * most <= attention_bytes_on_card(32, pairs), "{lengths:?}: {most}");
        }
    }

    #[test]
    fn few_come_together_where_there_are_many_scores() {
        let spans: Vec<_> = (0..8).map(|i| Span::document(i * 512..(i + 1) * 512)).collect();
        let buckets = buckets(&spans, 64);
        assert_eq!(buckets.iter().map(|bucket| bucket.pieces.len()).collect::<Vec<_>>(), [4, 4]);
    }
}
