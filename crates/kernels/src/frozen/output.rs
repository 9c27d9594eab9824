//! Where a product's numbers go, and what its tasks compute in.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use crate::bf16::{BLOCK, Sums};
use crate::scratch::grown;

/// Rows of an output that tasks write disjoint columns of.
#[derive(Clone, Copy)]
pub(super) struct Columns<'a, T = f32> {
    start: *mut T,
    rows: usize,
    width: usize,
    /// What the numbers are added to, if anything.
    onto: Option<&'a [T]>,
    numbers: PhantomData<&'a mut [T]>,
}

// SAFETY: writing is unsafe and asks for disjoint columns.
#[allow(unsafe_code)]
unsafe impl<T: Send> Send for Columns<'_, T> {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl<T: Sync> Sync for Columns<'_, T> {}

impl<'a, T: Copy> Columns<'a, T> {
    /// All of an output, in rows of `width`.
    pub(super) fn of(output: &'a mut [MaybeUninit<T>], width: usize) -> Self {
        Self::at_start(output.as_mut_ptr().cast(), output.len() / width, width)
    }

    /// All of what is there already.
    pub(super) fn over(numbers: &'a mut [T], width: usize) -> Self {
        Self::at_start(numbers.as_mut_ptr(), numbers.len() / width, width)
    }

    fn at_start(start: *mut T, rows: usize, width: usize) -> Self {
        Self { start, rows, width, onto: None, numbers: PhantomData }
    }

    /// The same, to be added to `onto`, where that is there.
    ///
    /// # Panics
    /// Where there are not as many numbers.
    pub(super) fn added_to(self, onto: Option<&'a [T]>) -> Self {
        assert!(onto.is_none_or(|onto| onto.len() == self.rows * self.width), "a number for every number");
        Self { onto, ..self }
    }

    /// Where `columns` of `row` begin.
    pub(super) fn at(self, row: usize, columns: &Range<usize>) -> *mut T {
        assert!(row < self.rows && columns.start <= columns.end && columns.end <= self.width);
        // SAFETY: within the output by the assertion.
        #[allow(unsafe_code)]
        unsafe {
            self.start.add(row * self.width + columns.start)
        }
    }

    /// Writes `columns` of `row`, whatever they are to be added to.
    ///
    /// # Safety
    /// No other task touches these columns.
    #[allow(unsafe_code)]
    pub(super) unsafe fn copy(self, row: usize, columns: &Range<usize>, numbers: &[T]) {
        let start = self.at(row, columns);
        assert_eq!(numbers.len(), columns.len(), "a number for every column");
        // SAFETY: within the columns that `at` has checked, and nobody else's.
        unsafe { start.copy_from_nonoverlapping(numbers.as_ptr(), numbers.len()) };
    }

    /// What `columns` of `row` are added to.
    fn row_onto(self, row: usize, columns: &Range<usize>) -> Option<&'a [T]> {
        self.onto.map(|onto| &onto[row * self.width..][..self.width][columns.clone()])
    }

    /// Writes what `columns` are added to, so that a product has to be added there; false where that is nothing.
    ///
    /// # Safety
    /// No other task touches these columns.
    #[allow(unsafe_code)]
    pub(super) unsafe fn lay(self, columns: &Range<usize>) -> bool {
        for row in 0..self.rows {
            if let Some(onto) = self.row_onto(row, columns) {
                // SAFETY: by what is asked for.
                unsafe { self.copy(row, columns, onto) };
            }
        }
        self.onto.is_some()
    }
}

impl Columns<'_> {
    /// Where `columns` of `rows` begin, where these are 32 of each.
    pub(super) fn block(self, rows: &Range<usize>, columns: &Range<usize>) -> Option<Sums> {
        assert!(rows.end <= self.rows);
        let whole = rows.len() == BLOCK && columns.len() == BLOCK;
        whole.then(|| Sums { start: self.at(rows.start, columns), stride: self.width })
    }

    /// Where lies what such a block is added to, to be read.
    pub(super) fn block_onto(self, rows: &Range<usize>, columns: &Range<usize>) -> Option<Sums> {
        let block = self.block(rows, columns)?;
        let onto = &self.onto?[rows.start * self.width + columns.start..];
        Some(Sums { start: onto.as_ptr().cast_mut(), ..block })
    }

    /// Writes `columns` of `row`, added to what they are to be added to.
    ///
    /// # Safety
    /// No other task touches these columns.
    #[allow(unsafe_code)]
    pub(super) unsafe fn write(self, row: usize, columns: &Range<usize>, numbers: &[f32]) {
        let Some(onto) = self.row_onto(row, columns) else {
            // SAFETY: by what is asked for.
            return unsafe { self.copy(row, columns, numbers) };
        };
        let start = self.at(row, columns);
        assert_eq!(numbers.len(), columns.len(), "a number for every column");
        for (i, (x, y)) in onto.iter().zip(numbers).enumerate() {
            // SAFETY: within the columns that `at` has checked, and nobody else's.
            unsafe { start.add(i).write(x + y) };
        }
    }
}

/// What a task needs beside its output, kept by each thread.
#[derive(Default)]
pub(super) struct Scratch {
    pub(super) sums: Vec<f32>,
    pub(super) tiles: Vec<u16>,
    pub(super) numbers: Vec<f32>,
}

impl Scratch {
    /// At least so many of each; what is in them is left from earlier tasks.
    pub(super) fn with<R>(sums: usize, tiles: usize, numbers: usize, task: impl FnOnce(&mut Self) -> R) -> R {
        thread_local! {
            static SCRATCH: RefCell<Scratch> = RefCell::default();
        }
        SCRATCH.with_borrow_mut(|scratch| {
            grown(&mut scratch.sums, sums);
            grown(&mut scratch.tiles, tiles);
            grown(&mut scratch.numbers, numbers);
            task(scratch)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::filled;

    const WIDTH: usize = 7;

    /// Three threads with columns of their own, in two batches of rows.
    #[test]
    fn threads_fill_an_output_column_by_column() {
        let (found, ()) = filled(5 * WIDTH, |output| {
            for (batch, output) in output.chunks_mut(3 * WIDTH).enumerate() {
                let all = Columns::of(output, WIDTH);
                std::thread::scope(|threads| {
                    for columns in [0..1, 1..4, 4..WIDTH] {
                        threads.spawn(move || {
                            for row in 0..all.rows {
                                let at = (3 * batch + row) * WIDTH;
                                let numbers: Vec<f32> =
                                    columns.clone().map(|column| (at + column) as f32).collect();
                                // SAFETY: each thread has other columns.
                                #[allow(unsafe_code)]
                                unsafe {
                                    all.write(row, &columns, &numbers);
                                }
                            }
                        });
                    }
                });
            }
        });
        assert_eq!(found, (0..5 * WIDTH).map(|i| i as f32).collect::<Vec<_>>());
    }

    #[test]
    fn an_output_without_numbers_is_one() {
        let (found, rows) = filled(0, |output| Columns::<f32>::of(output, WIDTH).rows);
        assert!(found.is_empty() && rows == 0);
    }

    fn output(rows: usize, width: usize) -> Vec<MaybeUninit<f32>> {
        vec![MaybeUninit::uninit(); rows * width]
    }

    #[test]
    #[should_panic(expected = "columns.end <= self.width")]
    fn columns_behind_the_last_are_refused() {
        Columns::of(&mut output(2, WIDTH), WIDTH).at(0, &(0..WIDTH + 1));
    }

    #[test]
    #[should_panic(expected = "row < self.rows")]
    fn rows_behind_the_last_are_refused() {
        Columns::of(&mut output(2, WIDTH), WIDTH).at(2, &(0..1));
    }

    /// Blocks of 32 x 32 alone are multiplied right to where they belong.
    #[test]
    fn only_whole_blocks_have_a_place() {
        let mut output = output(BLOCK, 2 * BLOCK);
        let all = Columns::of(&mut output, 2 * BLOCK);
        assert!(all.block(&(0..BLOCK), &(BLOCK..2 * BLOCK)).is_some_and(|sums| sums.stride == 2 * BLOCK));
        assert!(all.block(&(0..BLOCK), &(BLOCK..2 * BLOCK - 1)).is_none());
        assert!(all.block(&(1..BLOCK), &(0..BLOCK)).is_none());
    }
}
