//! What an adapter sees of the input that it shares with its layer.

use std::borrow::Cow;

use rayon::prelude::*;

use crate::dropout::Mask;
use crate::rewritten::Rewritten;

/// Rows of `width` numbers behind a mask, where there is one.
#[derive(Clone, Copy)]
pub struct Seen {
    pub mask: Option<Mask>,
    pub width: usize,
}

impl Seen {
    /// What is seen of the `x` of some tokens, the first of them `token`.
    pub fn of(self, token: usize, x: &[f32]) -> Cow<'_, [f32]> {
        let Some(mask) = self.mask else { return x.into() };
        let mut x = x.to_vec();
        mask.apply(token, &mut x, self.width);
        x.into()
    }

    /// Has `add` add to the gradient at the `x` of some tokens, the first of them `token`, and hides of it what was not
    /// seen.
    pub fn add_to(self, dx: &mut [f32], token: usize, add: impl FnOnce(&mut [f32])) {
        let Some(mask) = self.mask else { return add(dx) };
        let mut at_seen = vec![0.0; dx.len()];
        add(&mut at_seen);
        mask.apply(token, &mut at_seen, self.width);
        dx.iter_mut().zip(at_seen).for_each(|(dx, x)| *dx += x);
    }

    /// The gradient at `x`, where it is wanted, `tokens` of it a task.
    pub fn gradients<'d>(
        self,
        dx: Option<Rewritten<'d>>,
        x: &[f32],
        tokens: usize,
    ) -> Vec<Option<&'d mut [f32]>> {
        match dx {
            Some(dx) => dx.pieces(tokens * self.width).map(Some).collect(),
            None => x.chunks(tokens * self.width).map(|_| None).collect(),
        }
    }
}
