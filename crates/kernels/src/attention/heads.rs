//! Heads of tokens in memory, and the parts of them that tasks fetch and replace.

use std::marker::PhantomData;
use std::ops::Range;

use crate::rewritten::Rewritten;

/// Which tokens' heads, out of how many to a token, each of how many features.
#[derive(Debug, Clone)]
pub struct Part {
    /// The tokens.
    pub tokens: Range<usize>,
    /// Of each of them, these heads.
    pub heads: Range<usize>,
    /// Heads of a token.
    pub of: usize,
    /// Features of a head.
    pub dim: usize,
}

impl Part {
    /// The same heads of other tokens.
    pub fn at(&self, tokens: Range<usize>) -> Self {
        Self { tokens, ..self.clone() }
    }

    /// Where each token's heads lie among all numbers.
    fn runs(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let Self { tokens, heads, of, dim } = self.clone();
        tokens.map(move |token| (token * of + heads.start) * dim..(token * of + heads.end) * dim)
    }

    /// Whether a part lies within this one.
    fn holds(&self, part: &Self) -> bool {
        self.tokens.start <= part.tokens.start
            && part.tokens.end <= self.tokens.end
            && self.heads == part.heads
    }
}

/// Copies a part of `all` to `values`, one token after another.
pub fn fetch(all: &[f32], part: &Part, values: &mut Vec<f32>) {
    values.clear();
    part.runs().for_each(|run| values.extend_from_slice(&all[run]));
}

/// Numbers that tasks replace, each a part of its own, and together all of them.
#[derive(Clone, Copy)]
pub struct Shared<'a> {
    from: *const f32,
    out: *mut f32,
    length: usize,
    numbers: PhantomData<&'a mut [f32]>,
}

// SAFETY: nothing is reached but through `part`, which is unsafe and asks for disjoint parts.
#[allow(unsafe_code)]
unsafe impl Send for Shared<'_> {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    /// All of them.
    pub fn new(numbers: Rewritten<'a>) -> Self {
        let (from, out, length) = numbers.places();
        Self { from, out, length, numbers: PhantomData }
    }

    /// A part of the numbers, for one task.
    ///
    /// # Safety
    /// Parts that are alive at a time share no token's head.
    ///
    /// # Panics
    /// Where there are no such tokens or heads.
    #[allow(unsafe_code)]
    pub unsafe fn part(self, part: Part) -> Own<'a> {
        let exists = part.heads.end <= part.of && part.tokens.end * part.of * part.dim <= self.length;
        assert!(exists, "tokens and heads that exist");
        Own { all: self, part }
    }
}

/// The numbers of one task.
pub struct Own<'a> {
    all: Shared<'a>,
    part: Part,
}

impl Own<'_> {
    /// Copies the numbers of some of the tokens to `values`. They are there until others are stored.
    pub fn fetch(&self, tokens: Range<usize>, values: &mut Vec<f32>) {
        values.clear();
        for run in self.runs(tokens) {
            // SAFETY: `part` has checked that the run is there; nobody else writes to it.
            #[allow(unsafe_code)]
            let run = unsafe { std::slice::from_raw_parts(self.all.from.add(run.start), run.len()) };
            values.extend_from_slice(run);
        }
    }

    /// Replaces the numbers of some of the tokens by `values`.
    pub fn store(&mut self, tokens: Range<usize>, values: &[f32]) {
        let mut rest = values;
        for run in self.runs(tokens) {
            let (values, others) = rest.split_at(run.len());
            // SAFETY: `part` has checked that the run is there; nobody else reads or writes it, and the values are not
            // a part of it.
            #[allow(unsafe_code)]
            unsafe {
                self.all.out.add(run.start).copy_from_nonoverlapping(values.as_ptr(), values.len());
            }
            rest = others;
        }
    }

    fn runs(&self, tokens: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        let part = self.part.at(tokens);
        assert!(self.part.holds(&part), "tokens of the task's own");
        part.runs()
    }
}

#[cfg(test)]
mod tests {
    use std::mem::MaybeUninit;

    use super::*;

    const HEADS: usize = 3;
    const DIM: usize = 2;
    const TOKENS: usize = 4;

    fn numbers() -> Vec<f32> {
        (0..TOKENS * HEADS * DIM).map(|i| i as f32).collect()
    }

    /// The first `tokens` with one head.
    fn part(tokens: usize, head: usize) -> Part {
        Part { tokens: 0..tokens, heads: head..head + 1, of: HEADS, dim: DIM }
    }

    /// A thread for each head, all at a time, which take the tokens by twos.
    fn double(numbers: Rewritten) {
        let all = Shared::new(numbers);
        std::thread::scope(|threads| {
            for head in 0..HEADS {
                // SAFETY: each thread has another head.
                #[allow(unsafe_code)]
                let mut own = unsafe { all.part(part(TOKENS, head)) };
                threads.spawn(move || {
                    let mut values = Vec::new();
                    for start in (0..TOKENS).step_by(2) {
                        own.fetch(start..start + 2, &mut values);
                        for x in &mut values {
                            *x *= 2.0;
                        }
                        own.store(start..start + 2, &values);
                    }
                });
            }
        });
    }

    fn doubled() -> Vec<f32> {
        numbers().into_iter().map(|x| 2.0 * x).collect()
    }

    #[test]
    fn threads_replace_their_heads_in_place() {
        let mut values = numbers();
        double(Rewritten::InPlace(&mut values));
        assert_eq!(values, doubled());
    }

    #[test]
    fn threads_replace_their_heads_elsewhere() {
        let (values, mut out) = (numbers(), vec![MaybeUninit::uninit(); TOKENS * HEADS * DIM]);
        double(Rewritten::Elsewhere(&values, &mut out));
        // SAFETY: the threads have stored all tokens of all heads.
        #[allow(unsafe_code)]
        let out: Vec<f32> = out.into_iter().map(|x| unsafe { x.assume_init() }).collect();
        assert_eq!((values, out), (numbers(), doubled()));
    }

    #[test]
    #[should_panic(expected = "tokens and heads that exist")]
    fn tokens_behind_the_last_are_refused() {
        // SAFETY: it is the only part.
        #[allow(unsafe_code)]
        unsafe {
            Shared::new(Rewritten::InPlace(&mut numbers())).part(part(TOKENS + 1, 0));
        }
    }

    #[test]
    #[should_panic(expected = "tokens of the task's own")]
    fn tokens_of_others_are_refused() {
        let mut values = numbers();
        // SAFETY: it is the only part.
        #[allow(unsafe_code)]
        let own = unsafe { Shared::new(Rewritten::InPlace(&mut values)).part(part(TOKENS - 1, 0)) };
        own.fetch(0..TOKENS, &mut Vec::new());
    }
}
