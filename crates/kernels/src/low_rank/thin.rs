//! Products with a few rows, too few to keep a library for large products busy: eight rows at a time, so that what they
//! are multiplied with is read once.
//!
//! `low` is `[tokens, rows]`, and the rows, `[rows, width]`, are a multiple of [`ROWS`] many. Sums have an order of their
//! own, whatever the processor's vectors are, so that results are the same everywhere.

/// Rows that are multiplied together.
pub const ROWS: usize = 8;
/// Numbers of a row that are multiplied together, for sums of eight rows and of one.
const LANES: usize = 16;
const LONG: usize = 64;

/// `low = scale * x rows^T` of one token's `x`.
#[inline(always)]
pub fn dots(x: &[f32], rows: &[f32], scale: f32, low: &mut [f32]) {
    let width = x.len();
    for (rows, low) in rows.chunks_exact(ROWS * width).zip(low.as_chunks_mut::<ROWS>().0) {
        let rows: [_; ROWS] = std::array::from_fn(|r| rows[r * width..][..width].as_chunks::<LANES>());
        let mut sums = [[0.0; LANES]; ROWS];
        let (chunks, rest) = x.as_chunks::<LANES>();
        for (c, x) in chunks.iter().enumerate() {
            for (sums, (row, _)) in sums.iter_mut().zip(&rows) {
                for lane in 0..LANES {
                    sums[lane] += x[lane] * row[c][lane];
                }
            }
        }
        for ((low, sums), (_, row)) in low.iter_mut().zip(&sums).zip(&rows) {
            let rest: f32 = rest.iter().zip(*row).map(|(x, w)| x * w).sum();
            *low = scale * (sums.iter().sum::<f32>() + rest);
        }
    }
}

/// `y += low rows` of one token.
#[inline(always)]
pub fn add_rows(low: &[f32], rows: &[f32], y: &mut [f32]) {
    let width = y.len();
    let (chunks, rest) = y.as_chunks_mut::<LONG>();
    let first = chunks.len() * LONG;
    for (c, y) in chunks.iter_mut().enumerate() {
        let mut sums = *y;
        for (low, row) in low.iter().zip(rows.chunks_exact(width)) {
            let row = &row[c * LONG..][..LONG];
            for lane in 0..LONG {
                sums[lane] += low * row[lane];
            }
        }
        *y = sums;
    }
    for (low, row) in low.iter().zip(rows.chunks_exact(width)) {
        rest.iter_mut().zip(&row[first..]).for_each(|(y, w)| *y += low * w);
    }
}

/// `rows += low^T x`, over all tokens of `x`, `[tokens, width]`.
#[inline(always)]
pub fn add_outer(low: &[f32], x: &[f32], width: usize, rows: &mut [f32]) {
    let many = rows.len() / width;
    let whole = width - width % LONG;
    // A few numbers of all tokens stay in the nearest cache while all rows take them up, one after the other: of a loop
    // over eight sums the compiler makes scattered stores.
    for first in (0..whole).step_by(LONG) {
        for (r, row) in rows.chunks_exact_mut(width).enumerate() {
            let Some(row) = row[first..].first_chunk_mut::<LONG>() else { break };
            let mut sums = *row;
            for (x, low) in x.chunks_exact(width).zip(low.chunks_exact(many)) {
                let (x, low) = (&x[first..][..LONG], low[r]);
                for lane in 0..LONG {
                    sums[lane] += low * x[lane];
                }
            }
            *row = sums;
        }
    }
    for (r, row) in rows.chunks_exact_mut(width).enumerate() {
        for (x, low) in x.chunks_exact(width).zip(low.chunks_exact(many)) {
            row[whole..].iter_mut().zip(&x[whole..]).for_each(|(row, x)| *row += low[r] * x);
        }
    }
}
