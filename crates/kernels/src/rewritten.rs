//! Numbers that make way for others.

use rayon::prelude::*;

/// Numbers that an operation replaces by as many others: in their own memory if nobody else needs
/// them any more, otherwise in new memory. Pages that a process touches for the first time cost
/// more than most of the arithmetic here.
pub struct Rewritten<'a> {
    from: Option<&'a [f32]>,
    out: &'a mut [f32],
}

impl<'a> Rewritten<'a> {
    /// The numbers in `values` itself.
    pub fn in_place(values: &'a mut [f32]) -> Self {
        Self { from: None, out: values }
    }

    /// The numbers `from`, with the others to be written to `out`.
    ///
    /// # Panics
    /// Where these are not of one length.
    pub fn elsewhere(from: &'a [f32], out: &'a mut [f32]) -> Self {
        assert_eq!(from.len(), out.len(), "as many numbers as are replaced");
        Self { from: Some(from), out }
    }

    /// How many numbers there are.
    pub fn len(&self) -> usize {
        self.out.len()
    }

    /// Where the numbers are read, where the others are written, which may be one place, and how
    /// many there are.
    pub fn places(self) -> (*const f32, *mut f32, usize) {
        let out = self.out.as_mut_ptr();
        let from = self.from.map_or(out.cast_const(), <[f32]>::as_ptr);
        (from, out, self.out.len())
    }

    /// Pieces of `length`, to be replaced by several threads: each holds its numbers when it
    /// arrives.
    pub fn pieces(self, length: usize) -> impl IndexedParallelIterator<Item = &'a mut [f32]> {
        let Self { from, out } = self;
        out.par_chunks_mut(length).enumerate().map(move |(i, piece)| {
            if let Some(from) = from {
                piece.copy_from_slice(&from[i * length..][..piece.len()]);
            }
            piece
        })
    }
}
