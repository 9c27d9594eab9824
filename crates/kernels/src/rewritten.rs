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
            Self::InPlace(numbers) => {
                // One from the other: a pointer to read by that is taken by itself may not be used any more once the
                // other is there.
                let out = numbers.as_mut_ptr();
                (out.cast_const(), out, length)
            }
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

#[cfg(test)]
#[allow(clippy::float_cmp)] // whole numbers
mod tests {
    use super::*;

    /// What `replace` leaves of the numbers from 0 to 6, in their own memory and in other.
    fn both_ways(replace: impl Fn(Rewritten)) -> [Vec<f32>; 2] {
        let numbers: Vec<f32> = (0..7_u8).map(f32::from).collect();
        let mut in_place = numbers.clone();
        replace(Rewritten::InPlace(&mut in_place));
        let mut out = [MaybeUninit::uninit(); 7];
        replace(Rewritten::Elsewhere(&numbers, &mut out));
        // SAFETY: `replace` takes them all, which writes them.
        #[allow(unsafe_code)]
        let elsewhere = out.map(|x| unsafe { x.assume_init() });
        [in_place, elsewhere.to_vec()]
    }

    #[test]
    fn pieces_hold_their_numbers_and_keep_what_is_written() {
        let doubled = (0..7_u8).map(|x| f32::from(2 * x)).collect::<Vec<_>>();
        let found =
            both_ways(|numbers| numbers.pieces(3).for_each(|piece| piece.iter_mut().for_each(|x| *x *= 2.0)));
        assert_eq!(found, [doubled.clone(), doubled]);
    }

    #[test]
    fn numbers_are_read_at_one_place_and_written_at_the_other() {
        let found = both_ways(|numbers| {
            let (from, out, length) = numbers.places();
            for i in 0..length {
                // SAFETY: there are so many at both.
                #[allow(unsafe_code)]
                unsafe {
                    out.add(i).write(from.add(i).read() + 1.0);
                }
            }
        });
        let next = (1..8_u8).map(f32::from).collect::<Vec<_>>();
        assert_eq!(found, [next.clone(), next]);
    }
}
