//! Matrix products of one thread, on slices.

use std::cell::RefCell;
use std::ops::Range;

use crate::bf16::{
    BLOCK, Bf16Unit, DEPTH, Multiplier, RoundedRows, SIDE, Strips, left_strip, paired_rows, turned_rows,
};
use crate::frozen::Precision;
use crate::frozen::wide::widest;
use crate::scratch::grown;

/// A matrix of numbers that lie `strides` apart, between rows and between columns.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    values: &'a [f32],
    shape: [usize; 2],
    strides: [usize; 2],
}

impl<'a> Matrix<'a> {
    /// Rows of `cols` numbers each, `stride` from one to the next.
    ///
    /// # Panics
    /// Where `values` end before the last row does.
    pub fn new(values: &'a [f32], [rows, cols]: [usize; 2], stride: usize) -> Self {
        assert!(rows == 0 || values.len() >= (rows - 1) * stride + cols, "a matrix ends too early");
        Self { values, shape: [rows, cols], strides: [stride, 1] }
    }

    /// Rows one after another.
    pub fn rows(values: &'a [f32], cols: usize) -> Self {
        Self::new(values, [values.len() / cols, cols], cols)
    }

    /// Some of its rows and columns.
    fn part(self, rows: Range<usize>, cols: Range<usize>) -> Self {
        assert!(rows.end <= self.shape[0] && cols.end <= self.shape[1], "rows and columns that exist");
        let [down, right] = self.strides;
        let values = &self.values[rows.start * down + cols.start * right..];
        Self { values, shape: [rows.len(), cols.len()], ..self }
    }

    /// The numbers of row `i`, where they lie side by side.
    fn row(self, i: usize) -> &'a [f32] {
        &self.values[i * self.strides[0]..][..self.shape[1]]
    }

    /// `[rows, cols]`.
    pub fn shape(self) -> [usize; 2] {
        self.shape
    }

    /// Its numbers, row by row, where those of a row lie side by side.
    pub fn to_vec(self) -> Vec<f32> {
        (0..self.shape[0]).flat_map(|i| self.row(i)).copied().collect()
    }

    /// The same numbers, rows for columns.
    #[must_use]
    pub fn transposed(self) -> Self {
        let ([rows, cols], [down, right]) = (self.shape, self.strides);
        Self { values: self.values, shape: [cols, rows], strides: [right, down] }
    }
}

/// Rows of numbers to write to, `stride` from one to the next.
pub struct MatrixMut<'a> {
    values: &'a mut [f32],
    shape: [usize; 2],
    stride: usize,
}

impl<'a> MatrixMut<'a> {
    /// Rows of `cols` numbers each.
    ///
    /// # Panics
    /// Where `values` end before the last row does.
    pub fn new(values: &'a mut [f32], [rows, cols]: [usize; 2], stride: usize) -> Self {
        assert!(rows == 0 || values.len() >= (rows - 1) * stride + cols, "a matrix ends too early");
        Self { values, shape: [rows, cols], stride }
    }

    /// Rows one after another.
    pub fn rows(values: &'a mut [f32], cols: usize) -> Self {
        let rows = values.len() / cols;
        Self::new(values, [rows, cols], cols)
    }
}

/// Rows of `width` numbers become columns, a square of them at a time: then both are near.
pub fn turned(rows: &[f32], width: usize) -> Vec<f32> {
    let (height, mut columns) = (rows.len() / width, vec![0.0; rows.len()]);
    for top in (0..height).step_by(SIDE) {
        let bottom = height.min(top + SIDE);
        for left in (0..width).step_by(SIDE) {
            for col in left..width.min(left + SIDE) {
                let out = &mut columns[col * height..][top..bottom];
                for (out, row) in out.iter_mut().zip(top..bottom) {
                    *out = rows[row * width + col];
                }
            }
        }
    }
    columns
}

/// `c = a b`, or `c += a b`, the factors rounded to bf16 where `precision` says so and the processor can. Sums
/// are float32 either way.
///
/// # Panics
/// Where the shapes do not fit.
pub fn multiply(a: Matrix, b: Matrix, c: MatrixMut, add: bool, precision: Precision) {
    let [rows, cols] = b.shape;
    let factor = RightFactor::in_memory(b, precision, Packs::with(|packs| std::mem::take(&mut packs.right)));
    factor.multiply(a, 0..rows, 0..cols, c, add);
    if let Some((_, memory)) = factor.packed {
        Packs::with(|packs| packs.right = memory);
    }
}

/// The shape `[m, n, k]` of `c = a b`.
fn shape(a: Matrix, b: Matrix, c: &MatrixMut) -> [usize; 3] {
    let ([m, k], [n_rows, n]) = (a.shape, b.shape);
    assert!(k == n_rows && c.shape == [m, n], "shapes of a product");
    [m, n, k]
}

/// `c = a b`, or `c += a b`.
///
/// # Panics
/// Where the shapes do not fit.
#[allow(clippy::needless_pass_by_value)] // written to, as a `&mut` would be
pub fn multiply_f32(a: Matrix, b: Matrix, c: MatrixMut, add: bool) {
    let shape = shape(a, b, &c);
    let ([a_row, a_col], [b_row, b_col]) = (a.strides, b.strides);
    // SAFETY: a, b and c hold what their shapes and strides reach, as their constructors have checked, and the
    // shapes fit.
    #[allow(unsafe_code)]
    unsafe {
        let c = (c.values.as_mut_ptr(), c.stride, add);
        product_f32(shape, c, (a.values, a_row, a_col), (b.values, b_row, b_col));
    }
}

/// `c = a b`, `[m, k]` by `[k, n]`; a and b with their row and column strides, c with its row stride, and whether to add to
/// what is there.
///
/// # Safety
/// c may be written at `m` rows of `n`, and read where it is added to; a and b hold what their strides reach.
#[allow(unsafe_code)]
pub unsafe fn product_f32(
    [m, n, k]: [usize; 3],
    (c, c_row, add): (*mut f32, usize, bool),
    (a, a_row, a_col): (&[f32], usize, usize),
    (b, b_row, b_col): (&[f32], usize, usize),
) {
    let keep = if add { 1.0 } else { 0.0 };
    // SAFETY: by the contract above.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c,
            1,
            c_row as isize,
            add,
            a.as_ptr(),
            a_col as isize,
            a_row as isize,
            b.as_ptr(),
            b_col as isize,
            b_row as isize,
            keep,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// A right factor that many products share: it is packed once, where they are in bf16.
pub struct RightFactor<'a> {
    numbers: Matrix<'a>,
    packed: Option<(Bf16Unit, Vec<u16>)>,
}

impl<'a> RightFactor<'a> {
    /// Of products in `precision`.
    pub fn new(numbers: Matrix<'a>, precision: Precision) -> Self {
        Self::in_memory(numbers, precision, Vec::new())
    }

    /// The same, packed in memory that is there already.
    fn in_memory(numbers: Matrix<'a>, precision: Precision, mut memory: Vec<u16>) -> Self {
        let unit = Bf16Unit::detect().filter(|_| precision == Precision::Bf16);
        let packed = unit.map(|unit| {
            Packs::with(|packs| packs.fill_right(&Multiplier::new(unit), numbers, &mut memory));
            (unit, memory)
        });
        Self { numbers, packed }
    }

    /// `c = a b`, or `c += a b`, with `rows` and `cols` of this factor for b. Both begin at a multiple of 32; what
    /// follows the rows is multiplied by zeros.
    ///
    /// # Panics
    /// Where the shapes do not fit.
    pub fn multiply(&self, a: Matrix, rows: Range<usize>, cols: Range<usize>, c: MatrixMut, add: bool) {
        let b = self.numbers.part(rows.clone(), cols.clone());
        let Some((unit, tiles)) = &self.packed else { return multiply_f32(a, b, c, add) };
        assert!(rows.start.is_multiple_of(DEPTH) && cols.start.is_multiple_of(BLOCK), "whole tiles before");
        let ([m, n, k], multiplier) = (shape(a, b, &c), Multiplier::new(*unit));
        let (depth, whole_depth) = (k.next_multiple_of(DEPTH), self.numbers.shape[0].next_multiple_of(DEPTH));
        let first = cols.start / SIDE * whole_depth + rows.start;
        let right = |i: usize| &tiles[(first + i * whole_depth) * SIDE..][..depth * SIDE];
        let MatrixMut { values, stride, .. } = c;
        // Packed whole: it is to fit into a core's cache.
        Packs::with(|packs| {
            packs.fill_left(&multiplier, a, depth);
            let left = |i: usize| &packs.left[i * depth * SIDE..][..depth * SIDE];
            for side in 0..n.div_ceil(BLOCK) {
                for block in 0..m.div_ceil(BLOCK) {
                    let pair = |i: usize| [2 * i, 2 * i + 1];
                    let strips = Strips { left: pair(block).map(left), right: pair(side).map(right) };
                    let (row, col) = (block * BLOCK, side * BLOCK);
                    let (rows, cols) = (BLOCK.min(m - row), BLOCK.min(n - col));
                    let sums = &mut values[row * stride + col..];
                    if rows == BLOCK && cols == BLOCK {
                        multiplier.multiply_block(strips, !add, sums, stride);
                    } else {
                        let edge = &mut packs.edge;
                        multiplier.multiply_block(strips, true, edge, BLOCK);
                        let rows = sums.chunks_mut(stride).zip(edge.chunks_exact(BLOCK)).take(rows);
                        widest!(|| {
                            for (sums, edge) in rows {
                                for (sum, x) in sums.iter_mut().zip(&edge[..cols]) {
                                    *sum = if add { *sum + x } else { *x };
                                }
                            }
                        });
                    }
                }
            }
        });
    }
}

/// Memory that both factors of a product are packed in, kept by each thread.
struct Packs {
    left: Vec<u16>,
    right: Vec<u16>,
    rows: Vec<u16>,
    numbers: Vec<f32>,
    /// A block at the edge of a product, which has fewer rows or columns.
    edge: [f32; BLOCK * BLOCK],
}

impl Default for Packs {
    fn default() -> Self {
        let (left, right, rows, numbers) = Default::default();
        Self { left, right, rows, numbers, edge: [0.0; BLOCK * BLOCK] }
    }
}

impl Packs {
    fn with<R>(product: impl FnOnce(&mut Self) -> R) -> R {
        thread_local! {
            static PACKS: RefCell<Packs> = RefCell::default();
        }
        PACKS.with_borrow_mut(product)
    }

    fn fill_left(&mut self, multiplier: &Multiplier, a: Matrix, depth: usize) {
        let [m, k] = a.shape;
        let rows = if a.strides[1] == 1 {
            a
        } else {
            // The tiles want whole rows.
            let numbers = grown(&mut self.numbers, m * k);
            for (i, row) in numbers.chunks_exact_mut(k).enumerate() {
                let column = a.values[i * a.strides[0]..].iter().step_by(a.strides[1]);
                row.iter_mut().zip(column).for_each(|(x, y)| *x = *y);
            }
            Matrix::rows(numbers, k)
        };
        let left = grown(&mut self.left, m.next_multiple_of(BLOCK) * depth);
        for (strip, tiles) in left.chunks_exact_mut(SIDE * depth).enumerate() {
            let first = strip * SIDE;
            left_strip(multiplier, (first..m.min(first + SIDE)).map(|row| rows.row(row)), tiles);
        }
    }

    fn fill_right(&mut self, multiplier: &Multiplier, b: Matrix, right: &mut Vec<u16>) {
        let (depth, width) = (b.shape[0].next_multiple_of(DEPTH), b.shape[1].next_multiple_of(BLOCK));
        let right = grown(right, width * depth);
        if b.strides[1] == 1 {
            let rows = grown(&mut self.rows, 2 * width);
            paired_rows(&b, multiplier, 0, 0..depth, &mut [], rows, right);
        } else {
            let rows = grown(&mut self.rows, SIDE * depth);
            turned_rows(&b.transposed(), multiplier, 0, 0..depth, &mut [], rows, right);
        }
    }
}

impl RoundedRows for Matrix<'_> {
    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn round_row(
        &self,
        multiplier: &Multiplier,
        row: usize,
        cols: Range<usize>,
        _: &mut [f32],
        out: &mut [u16],
    ) {
        multiplier.round(&self.row(row)[cols], out);
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp)] // small whole numbers, exact in every precision
mod tests {
    use super::*;
    use crate::small_numbers;

    /// Rows of `stride` numbers, of which the last has no more than a matrix of `cols` needs.
    fn numbers([rows, cols]: [usize; 2], stride: usize, seed: usize) -> Vec<f32> {
        small_numbers((rows - 1) * stride + cols, seed)
    }

    /// Factors and results end where their last rows do; what lies between rows stays as it is.
    #[test]
    fn products_of_all_layouts_write_what_is_theirs() {
        let sizes: &[[usize; 3]] = if cfg!(miri) {
            &[[3, 5, 2], [17, 2, 3]]
        } else {
            &[[1, 1, 1], [3, 5, 2], [32, 32, 32], [33, 31, 40], [70, 65, 33]]
        };
        let turns = [[false, false], [false, true], [true, false], [true, true]];
        for (&[m, n, k], [turn_a, turn_b]) in sizes.iter().flat_map(|size| turns.map(|turn| (size, turn))) {
            let lay =
                |[rows, cols]: [usize; 2], turned: bool| if turned { [cols, rows] } else { [rows, cols] };
            let (a_shape, b_shape) = (lay([m, k], turn_a), lay([k, n], turn_b));
            let (a, b) = (numbers(a_shape, a_shape[1] + 1, 0), numbers(b_shape, b_shape[1] + 2, 3));
            let a = Matrix::new(&a, a_shape, a_shape[1] + 1);
            let b = Matrix::new(&b, b_shape, b_shape[1] + 2);
            let a = if turn_a { a.transposed() } else { a };
            let b = if turn_b { b.transposed() } else { b };
            let at = |matrix: Matrix, i: usize, j: usize| {
                matrix.values[i * matrix.strides[0] + j * matrix.strides[1]]
            };
            let stride = n + 3;
            // Miri has no unit for bf16: both are one.
            let precisions =
                if cfg!(miri) { &[Precision::F32][..] } else { &[Precision::F32, Precision::Bf16] };
            for (add, &precision) in
                [false, true].into_iter().flat_map(|add| precisions.iter().map(move |p| (add, p)))
            {
                let before = numbers([m, n], stride, 1);
                let mut c = before.clone();
                multiply(a, b, MatrixMut::new(&mut c, [m, n], stride), add, precision);
                for (i, (found, before)) in c.into_iter().zip(before).enumerate() {
                    let (row, col) = (i / stride, i % stride);
                    let sum: f32 = (0..k).map(|t| at(a, row, t) * at(b, t, col.min(n - 1))).sum();
                    let expected = match (col < n, add) {
                        (true, true) => before + sum,
                        (true, false) => sum,
                        (false, _) => before,
                    };
                    assert_eq!(
                        found, expected,
                        "{m} x {n} x {k}, add: {add}, {precision:?}, at {row}, {col}"
                    );
                }
            }
        }
    }
}
