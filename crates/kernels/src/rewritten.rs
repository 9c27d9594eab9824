//! Numbers that make way for others.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use crate::frozen::wide::widest;

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

    /// Adds others to them, number by number in the order of the others, each as long or shorter.
    pub fn add(self, others: &[&[f32]]) {
        const PIECE: usize = 1 << 14;
        assert!(others.iter().all(|other| other.len() <= self.len()), "no more summands than sums");
        self.pieces(PIECE).enumerate().for_each(|(i, sums)| {
            widest!(|| {
                for other in others {
                    let other = other.get(i * PIECE..).unwrap_or_default();
                    for (sum, x) in sums.iter_mut().zip(other) {
                        *sum += x;
                    }
                }
            });
        });
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

/// The sum of `parts` in their order, `length` numbers; parts that are shorter end with zeros.
pub fn total(parts: Vec<Vec<f32>>, length: usize) -> Vec<f32> {
    let mut parts = parts.into_iter();
    let mut sums = parts.next().unwrap_or_default();
    sums.resize(length, 0.0);
    let others: Vec<_> = parts.collect();
    Rewritten::InPlace(&mut sums).add(&others.iter().map(Vec::as_slice).collect::<Vec<_>>());
    sums
}

#[cfg(test)]
#[allow(clippy::float_cmp)] // whole numbers
pub(crate) mod tests {
    use super::*;

    /// What `replace`, which writes them all, makes of numbers in their own memory; the same as in other.
    pub(crate) fn both_ways<R: PartialEq + std::fmt::Debug, const N: usize>(
        numbers: &[Vec<f32>; N],
        replace: impl Fn([Rewritten; N]) -> R,
    ) -> ([Vec<f32>; N], R) {
        let mut in_place = numbers.clone();
        let result = replace(in_place.each_mut().map(|numbers| Rewritten::InPlace(numbers)));
        let mut out = numbers.each_ref().map(|numbers| vec![MaybeUninit::uninit(); numbers.len()]);
        let mut places = out.iter_mut();
        let again = replace(numbers.each_ref().map(|numbers| {
            Rewritten::Elsewhere(numbers, places.next().map_or(&mut [], |out| out.as_mut_slice()))
        }));
        // SAFETY: by what is asked of `replace`.
        #[allow(unsafe_code)]
        let out = out.map(|out| out.into_iter().map(|x| unsafe { x.assume_init() }).collect::<Vec<f32>>());
        assert_eq!((&in_place, &result), (&out, &again), "in place and elsewhere");
        (in_place, result)
    }

    fn numbers(from: u8, factor: u8) -> Vec<f32> {
        (from..from + 7).map(|x| f32::from(factor * x)).collect()
    }

    #[test]
    fn pieces_hold_their_numbers_and_keep_what_is_written() {
        let double = |piece: &mut [f32]| piece.iter_mut().for_each(|x| *x *= 2.0);
        let ([found], ()) = both_ways(&[numbers(0, 1)], |[numbers]| numbers.pieces(3).for_each(double));
        assert_eq!(found, numbers(0, 2));
    }

    /// Several pieces, to which one adds all and one the beginning.
    #[test]
    fn others_are_added_as_far_as_they_go() {
        let numbers = |count: u16, factor: f32| (0..count).map(|x| factor * f32::from(x)).collect::<Vec<_>>();
        let (all, some) = (numbers(40_000, 2.0), numbers(20_000, 5.0));
        let ([found], ()) = both_ways(&[numbers(40_000, 1.0)], |[sums]| sums.add(&[&all, &some]));
        assert!(found[..20_000] == numbers(20_000, 8.0));
        assert!(found[20_000..] == numbers(40_000, 3.0)[20_000..]);
        assert_eq!(total(vec![vec![1.0], vec![2.0, 3.0]], 3), [3.0, 3.0, 0.0]);
        assert_eq!(total(Vec::new(), 1), [0.0]);
    }

    #[test]
    fn numbers_are_read_at_one_place_and_written_at_the_other() {
        let ([found], ()) = both_ways(&[numbers(0, 1)], |[numbers]| {
            let (from, out, length) = numbers.places();
            for i in 0..length {
                // SAFETY: there are so many at both.
                #[allow(unsafe_code)]
                unsafe {
                    out.add(i).write(from.add(i).read() + 1.0);
                }
            }
        });
        assert_eq!(found, numbers(1, 1));
    }
}
