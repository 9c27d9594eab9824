//! Numbers that make way for others.

use std::mem::MaybeUninit;

use rayon::prelude::*;

/// Numbers that an operation replaces by as many others: in their own memory if nobody else needs
/// them any more, otherwise in new memory. Pages that a process touches for the first time cost
/// more than most of the arithmetic here, and what one thread fills with zeros another has to fetch.
pub enum Rewritten<'a> {
    /// The numbers, where the others are to be.
    InPlace(&'a mut [f32]),
    /// The numbers, and where the others are to be: memory of the same length that nobody has written yet.
    Elsewhere(&'a [f32], &'a mut [MaybeUninit<f32>]),
}

impl<'a> Rewritten<'a> {
    /// How many numbers there are.
    pub fn len(&self) -> usize {
        match self {
            Self::InPlace(numbers) => numbers.len(),
            Self::Elsewhere(numbers, _) => numbers.len(),
        }
    }

    /// Where the numbers are read, where all the others are to be written, which may be one place or hold nothing yet,
    /// and how many there are.
    pub fn places(self) -> (*const f32, *mut f32, usize) {
        let length = self.len();
        match self {
            Self::InPlace(numbers) => (numbers.as_ptr(), numbers.as_mut_ptr(), length),
            Self::Elsewhere(from, out) => (from.as_ptr(), out.as_mut_ptr().cast(), length),
        }
    }

    /// Pieces of `length`, to be replaced by several threads: each holds its numbers when it
    /// arrives.
    pub fn pieces(self, length: usize) -> impl IndexedParallelIterator<Item = &'a mut [f32]> {
        let (in_place, from, out): (_, &[f32], _) = match self {
            Self::InPlace(numbers) => (numbers, &[], Default::default()),
            Self::Elsewhere(from, out) => (Default::default(), from, out),
        };
        // One of the two has no pieces.
        let elsewhere = from.par_chunks(length).zip(out.par_chunks_mut(length));
        in_place.par_chunks_mut(length).chain(elsewhere.map(|(from, out)| out.write_copy_of_slice(from)))
    }
}
