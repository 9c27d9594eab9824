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
