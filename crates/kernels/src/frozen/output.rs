//! Where a product's numbers go, and what its tasks compute in.

use std::cell::RefCell;
use std::ops::Range;

use crate::bf16::{BLOCK, Sums};

/// What a product is written to: memory that nothing has filled with zeros first.
pub(super) struct Output {
    values: Vec<f32>,
    rows: usize,
    width: usize,
}

impl Output {
    pub(super) fn new(rows: usize, width: usize) -> Self {
        Self { values: Vec::with_capacity(rows * width), rows, width }
    }

    /// From row `first` on.
    pub(super) fn below(&mut self, first: usize) -> Columns {
        assert!(first <= self.rows);
        // SAFETY: within the allocation by the assertion.
        #[allow(unsafe_code)]
        let start = unsafe { self.values.as_mut_ptr().add(first * self.width) };
        Columns { start, rows: self.rows - first, width: self.width }
    }

    /// The numbers.
    ///
    /// # Safety
    /// All of them have been written.
    #[allow(unsafe_code)]
    pub(super) unsafe fn written(mut self) -> Vec<f32> {
        // SAFETY: the capacity was asked for in `new`, and the caller has written it all.
        unsafe { self.values.set_len(self.rows * self.width) };
        self.values
    }
}

/// Rows of an output that tasks write disjoint columns of.
#[derive(Clone, Copy)]
pub(super) struct Columns {
    start: *mut f32,
    rows: usize,
    width: usize,
}

// SAFETY: writing is unsafe and asks for disjoint columns.
#[allow(unsafe_code)]
unsafe impl Send for Columns {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Columns {}

impl Columns {
    /// Where `columns` of `row` begin.
    pub(super) fn at(self, row: usize, columns: &Range<usize>) -> *mut f32 {
        assert!(row < self.rows && columns.start <= columns.end && columns.end <= self.width);
        // SAFETY: within the output by the assertion.
        #[allow(unsafe_code)]
        unsafe {
            self.start.add(row * self.width + columns.start)
        }
    }

    /// Where `columns` of `rows` begin, where these are 32 of each.
    pub(super) fn block(self, rows: &Range<usize>, columns: &Range<usize>) -> Option<Sums> {
        assert!(rows.end <= self.rows);
        let whole = rows.len() == BLOCK && columns.len() == BLOCK;
        whole.then(|| Sums { start: self.at(rows.start, columns), stride: self.width })
    }

    /// Writes `columns` of `row`.
    ///
    /// # Safety
    /// The output is still there, and no other task touches these columns.
    #[allow(unsafe_code)]
    pub(super) unsafe fn write(self, row: usize, columns: &Range<usize>, numbers: &[f32]) {
        let start = self.at(row, columns);
        assert_eq!(numbers.len(), columns.len(), "a number for every column");
        // SAFETY: within the columns that `at` has checked, and nobody else's.
        unsafe { start.copy_from_nonoverlapping(numbers.as_ptr(), numbers.len()) };
    }
}

/// What a task needs beside its output. Kept by each thread: fresh memory would cost more than what
/// is computed in it.
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
            scratch.sums.resize(sums.max(scratch.sums.len()), 0.0);
            scratch.tiles.resize(tiles.max(scratch.tiles.len()), 0);
            scratch.numbers.resize(numbers.max(scratch.numbers.len()), 0.0);
            task(scratch)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDTH: usize = 7;

    /// Three threads with columns of their own, in two batches of rows.
    #[test]
    fn threads_fill_an_output_column_by_column() {
        let mut output = Output::new(5, WIDTH);
        for (first, rows) in [(0, 3), (3, 2)] {
            let below = output.below(first);
            std::thread::scope(|threads| {
                for columns in [0..1, 1..4, 4..WIDTH] {
                    threads.spawn(move || {
                        for row in 0..rows {
                            let at = (first + row) * WIDTH;
                            let numbers: Vec<f32> =
                                columns.clone().map(|column| (at + column) as f32).collect();
                            // SAFETY: each thread has other columns, and ends before the output does.
                            #[allow(unsafe_code)]
                            unsafe {
                                below.write(row, &columns, &numbers);
                            }
                        }
                    });
                }
            });
        }
        // SAFETY: five rows of all columns were written.
        #[allow(unsafe_code)]
        let found = unsafe { output.written() };
        assert_eq!(found, (0..5 * WIDTH).map(|i| i as f32).collect::<Vec<_>>());
    }

    #[test]
    fn an_output_without_numbers_is_one() {
        let mut output = Output::new(0, WIDTH);
        output.below(0);
        // SAFETY: there are none to write.
        #[allow(unsafe_code)]
        let found = unsafe { output.written() };
        assert!(found.is_empty());
    }

    #[test]
    #[should_panic(expected = "columns.end <= self.width")]
    fn columns_behind_the_last_are_refused() {
        Output::new(2, WIDTH).below(0).at(0, &(0..WIDTH + 1));
    }

    #[test]
    #[should_panic(expected = "row < self.rows")]
    fn rows_behind_the_last_are_refused() {
        Output::new(2, WIDTH).below(1).at(1, &(0..1));
    }

    /// Blocks of 32 x 32 alone are multiplied right to where they belong.
    #[test]
    fn only_whole_blocks_have_a_place() {
        let mut output = Output::new(BLOCK, 2 * BLOCK);
        let all = output.below(0);
        assert!(all.block(&(0..BLOCK), &(BLOCK..2 * BLOCK)).is_some_and(|sums| sums.stride == 2 * BLOCK));
        assert!(all.block(&(0..BLOCK), &(BLOCK..2 * BLOCK - 1)).is_none());
        assert!(all.block(&(1..BLOCK), &(0..BLOCK)).is_none());
    }
}
