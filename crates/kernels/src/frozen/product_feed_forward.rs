//! A gated feed-forward with products in bf16: what its matrices make of a block of tokens is gated while it is near, and
//! packed for the next product; both products are kept in bf16 for the way back, which gates and packs gradients likewise.

use std::mem::MaybeUninit;
use std::ops::Range;

use rayon::prelude::*;

use super::FrozenMatrix;
use super::output::{Columns, Scratch};
use super::product::{TOKENS, column_step, columns_a_task};
use super::product_bf16::{
    BACKWARD_DEPTH, Cut, FORWARD_DEPTH, Packed, Room, Task, block_strips, each_product, sum_of_products,
    with_room,
};
use crate::bf16::{BLOCK, Bf16Unit, Multiplier, SIDE, Strips, paired_rows, turned_rows};
use crate::glu::{Activation, gates};
use crate::threads::stay_awake;

/// Numbers that are kept of a block: gates, then what they gate.
const KEPT: usize = 2 * BLOCK * BLOCK;

// What is kept of a block is a turn.
const _: () = assert!(gates::TURN == BLOCK * BLOCK);

/// `(activation(x G^T) * (x U^T)) D^T`, with gate and up `[inner, outer]` and down `[outer, inner]`.
#[derive(Clone, Copy)]
pub(super) struct FeedForward<'a> {
    pub gate: &'a FrozenMatrix,
    pub up: &'a FrozenMatrix,
    pub down: &'a FrozenMatrix,
    pub activation: Activation,
}

impl FeedForward<'_> {
    /// How many numbers are kept of so many tokens.
    pub fn kept_of(self, tokens: usize) -> usize {
        tokens.div_ceil(BLOCK) * self.sides() * KEPT
    }

    /// Blocks of columns between the products.
    fn sides(self) -> usize {
        self.gate.shape()[0].div_ceil(BLOCK)
    }

    /// Writes the product, added to `onto` if that is there, to all of `y`, and to all of `kept` what the way back needs; where
    /// either is not there, it is not computed.
    ///
    /// # Panics
    /// Where `x` is not whole rows, or there are not as many of the others.
    pub fn forward(
        self,
        unit: Bf16Unit,
        x: &[f32],
        onto: Option<&[f32]>,
        mut y: Option<&mut [MaybeUninit<f32>]>,
        mut kept: Option<&mut [MaybeUninit<u16>]>,
    ) {
        let [inner, outer] = self.gate.shape();
        assert!(x.len().is_multiple_of(outer), "whole rows");
        assert!(y.as_ref().is_none_or(|y| y.len() == x.len()), "as many rows of results");
        assert!(onto.is_none_or(|onto| onto.len() == x.len()), "as many rows to be added to");
        let room = self.kept_of(x.len() / outer);
        assert!(kept.as_ref().is_none_or(|kept| kept.len() == room), "room for every token");
        stay_awake();
        for (i, x) in x.chunks(TOKENS * outer).enumerate() {
            let tokens = x.len() / outer;
            let y = y.as_mut().and_then(|y| y.split_off_mut(..x.len()));
            let kept = kept.as_mut().and_then(|kept| kept.split_off_mut(..self.kept_of(tokens)));
            let kept = kept.map(|kept| Columns::of(kept, self.sides() * KEPT));
            let cut = Cut::new(x.len(), outer, FORWARD_DEPTH);
            let between = Cut::new(tokens * inner, inner, FORWARD_DEPTH);
            with_room(cut.numbers() + between.numbers(), |room| {
                let (left, gated) = room.split_at_mut(cut.numbers());
                let left = cut.pack(unit, x, outer, left);
                let room = y.is_some().then(|| Room::of(gated, between));
                let columns = columns_a_task(2 * inner, 2 * BLOCK) / 2;
                (0..inner.div_ceil(columns)).into_par_iter().for_each(|task| {
                    let here = task * columns..inner.min((task + 1) * columns);
                    self.gate_columns(unit, &left, here, room.as_ref(), kept);
                });
                let Some(y) = y else { return };
                let onto = onto.map(|onto| &onto[i * TOKENS * outer..][..x.len()]);
                let gated = Packed { values: gated, cut: between };
                each_product(unit, &[(self.down, Columns::of(y, outer).added_to(onto))], &gated, tokens);
            });
        }
    }

    /// Columns `here` of what the last product reads, for a task: a pass along the summed dimension at a time.
    fn gate_columns(
        self,
        unit: Bf16Unit,
        left: &Packed,
        here: Range<usize>,
        gated: Option<&Room>,
        kept: Option<Columns<u16>>,
    ) {
        let (sides, passes) = (here.len().div_ceil(BLOCK), left.cut.passes());
        let (columns, deepest) = (sides * BLOCK, left.cut.pass);
        // What takes one pass is gated right away.
        let sums_at_hand = if passes == 1 { 1 } else { left.cut.blocks(sides).count() };
        let (sums, tiles) = (sums_at_hand * 2 * BLOCK * BLOCK, 2 * columns * deepest + SIDE * deepest);
        Scratch::with(sums, tiles, deepest, |Scratch { sums, tiles, numbers }| {
            let multiplier = Multiplier::new(unit);
            let (right, rows_at_hand) = tiles.split_at_mut(2 * columns * deepest);
            let sums = sums.as_chunks_mut::<{ BLOCK * BLOCK }>().0.as_chunks_mut::<2>().0;
            for pass in 0..passes {
                let summed = left.cut.summed(pass);
                let right = &mut right[..2 * columns * summed.len()];
                let halves = right.chunks_exact_mut(columns * summed.len());
                for (w, right) in [self.gate, self.up].into_iter().zip(halves) {
                    turned_rows(w, &multiplier, here.start, summed.clone(), numbers, rows_at_hand, right);
                }
                for (i, (block, side)) in left.cut.blocks(sides).enumerate() {
                    let sums = &mut sums[i % sums_at_hand];
                    for (side, sums) in [side, sides + side].into_iter().zip(&mut *sums) {
                        let right = block_strips(right, summed.len(), side);
                        let strips = Strips { left: left.block(pass, block), right };
                        multiplier.multiply_block(strips, pass == 0, sums, BLOCK);
                    }
                    if pass + 1 == passes {
                        // SAFETY: these columns, and what is kept of them, are this task's alone.
                        #[allow(unsafe_code)]
                        unsafe {
                            let at = [block, here.start / BLOCK + side];
                            self.gate_block(&multiplier, sums, at, gated, kept);
                        }
                    }
                }
            }
        });
    }

    /// Writes what a block of both products becomes, and what is kept of it.
    ///
    /// # Safety
    /// No other task touches this block.
    #[allow(unsafe_code)]
    unsafe fn gate_block(
        self,
        multiplier: &Multiplier,
        sums: &mut [[f32; BLOCK * BLOCK]; 2],
        at: [usize; 2],
        gated: Option<&Room>,
        kept: Option<Columns<u16>>,
    ) {
        if let Some(kept) = kept {
            let mut rounded = [0; KEPT];
            multiplier.round(sums.as_flattened(), &mut rounded);
            let [block, side] = at;
            // SAFETY: by what is asked for.
            unsafe { kept.copy(block, &(side * KEPT..(side + 1) * KEPT), &rounded) };
        }
        if let Some(gated) = gated {
            let [gate, up] = sums;
            gates::forward_piece(gate, up, self.activation);
            // SAFETY: as above.
            unsafe { gated.put(multiplier, gate, at) };
        }
    }

    /// Writes the gradient at `x` to all of `dx`, from the products that [`Self::forward`] has kept.
    ///
    /// # Panics
    /// Where `dy` is not whole rows, `kept` not of as many tokens, or `dx` not as many.
    pub fn backward(self, unit: Bf16Unit, kept: &[u16], dy: &[f32], dx: &mut [MaybeUninit<f32>]) {
        let [inner, outer] = self.gate.shape();
        assert!(dy.len().is_multiple_of(outer), "whole rows");
        let all = [dy.len(), self.kept_of(dy.len() / outer)];
        assert_eq!([dx.len(), kept.len()], all, "as many rows of all");
        stay_awake();
        let chunks = dy.chunks(TOKENS * outer).zip(kept.chunks(self.kept_of(TOKENS)));
        for ((dy, kept), dx) in chunks.zip(dx.chunks_mut(TOKENS * outer)) {
            let tokens = dy.len() / outer;
            let between = Cut::new(tokens * inner, inner, BACKWARD_DEPTH);
            let cut = Cut::new(dy.len(), outer, BACKWARD_DEPTH);
            with_room(cut.numbers() + 2 * between.numbers(), |room| {
                let (left, gradients) = room.split_at_mut(cut.numbers());
                let (at_gate, at_up) = gradients.split_at_mut(between.numbers());
                let left = cut.pack(unit, dy, outer, left);
                let room = [&mut *at_gate, &mut *at_up].map(|memory| Room::of(memory, between));
                self.gate_gradients(unit, &left, kept, &room);
                let gradients = [&*at_gate, at_up].map(|values| Packed { values, cut: between });
                sum_of_products(unit, &[self.gate, self.up], &gradients, tokens, Columns::of(dx, outer));
            });
        }
    }

    /// The gradients at both products, from `left` at the last one's result.
    fn gate_gradients(self, unit: Bf16Unit, left: &Packed, kept: &[u16], gradients: &[Room; 2]) {
        let [inner, _] = self.gate.shape();
        let columns = columns_a_task(inner, column_step(&[self.down]));
        let kept = kept.as_chunks::<KEPT>().0;
        (0..inner.div_ceil(columns)).into_par_iter().for_each(|task| {
            let here = task * columns..inner.min((task + 1) * columns);
            let first = here.start / BLOCK;
            Task { unit, pack: paired_rows, here }.run(&[(self.down, left)], |multiplier, step| {
                multiplier.multiply_block(step.strips, step.first, step.sums, BLOCK);
                if step.last {
                    let at @ [block, side] = [step.at[0], first + step.at[1]];
                    let kept = &kept[block * self.sides() + side];
                    let mut at_gate = [0.0; BLOCK * BLOCK];
                    gates::backward_kept_piece(kept, step.sums, &mut at_gate, self.activation);
                    for (gradients, numbers) in gradients.iter().zip([&at_gate, &*step.sums]) {
                        // SAFETY: these columns are this task's alone.
                        #[allow(unsafe_code)]
                        unsafe {
                            gradients.put(multiplier, numbers, at);
                        }
                    }
                }
            });
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frozen::product::{backward, forward};
    use crate::frozen::{Format, Precision};
    use crate::host::filled;
    use crate::rewritten::Rewritten;

    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (seed..seed + count).map(|i| ((i * 37 + i / 3) % 101) as f32 / 40.0 - 1.25).collect()
    }

    fn matrix([rows, cols]: [usize; 2], seed: usize) -> FrozenMatrix {
        let bytes: Vec<u8> = numbers(rows * cols, seed).iter().flat_map(|x| x.to_le_bytes()).collect();
        FrozenMatrix::dense(Format::F32, [rows, cols], bytes.into()).unwrap()
    }

    fn wide(half: u16) -> f32 {
        f32::from_bits(u32::from(half) << 16)
    }

    /// One task and several, one pass and several, more tokens than go at a time: the same numbers as by products and
    /// gates one after another, and on the way back as from products rounded to bf16.
    #[test]
    fn it_is_what_its_parts_are_one_after_another() {
        let Some(unit) = Bf16Unit::detect() else { return };
        for ([inner, outer], tokens) in [([70, 33], 5), ([600, 40], 67), ([1300, 1300], 33), ([33, 9], 1030)]
        {
            for activation in [Activation::Silu, Activation::GeluTanh] {
                let what = format!("{inner} x {outer}, {tokens} tokens, {activation:?}");
                let [gate, up] = [1, 5].map(|seed| matrix([inner, outer], seed));
                let down = matrix([outer, inner], 7);
                let all = FeedForward { gate: &gate, up: &up, down: &down, activation };
                let (x, dy) = (numbers(tokens * outer, 2), numbers(tokens * outer, 3));
                let onto = numbers(x.len(), 4);
                let run = |onto, read, keep| {
                    let room = |wanted, room: usize| if wanted { room } else { 0 };
                    filled(room(keep, all.kept_of(tokens)), |kept| {
                        let y = room(read, x.len());
                        filled(y, |y| all.forward(unit, &x, onto, read.then_some(y), keep.then_some(kept))).0
                    })
                };
                let (kept, y) = run(Some(&onto), true, true);
                assert!(run(None, false, true).0 == kept, "{what}, not read");

                let (gates, (ups, ())) = filled(tokens * inner, |g| {
                    filled(tokens * inner, |u| forward(vec![(&gate, g), (&up, u)], &x, None, Precision::Bf16))
                });
                let mut gated = gates.clone();
                gates::forward_piece(&mut gated, &ups, activation);
                let product =
                    |onto| filled(x.len(), |y| forward(vec![(&down, y)], &gated, onto, Precision::Bf16)).0;
                assert!(y == product(Some(&onto)), "{what}");
                assert!(run(None, true, false).1 == product(None), "{what}, nothing kept nor added to");

                let mut round = [gates.clone(), ups.clone()];
                for (block, kept) in kept.chunks(KEPT).enumerate() {
                    let [row, column] = [block / all.sides(), block % all.sides()].map(|i| i * BLOCK);
                    for (i, &half) in kept.iter().enumerate() {
                        let [row, column] = [row + i / BLOCK % BLOCK, column + i % BLOCK];
                        if row < tokens && column < inner {
                            round[i / (BLOCK * BLOCK)][row * inner + column] = wide(half);
                        } else {
                            assert_eq!(half & 0x7fff, 0, "{what}: nothing behind the last");
                        }
                    }
                }
                for (round, exact) in round.iter().zip([&gates, &ups]) {
                    let near = |(x, y): (&f32, &f32)| (x - y).abs() <= y.abs() / 256.0;
                    assert!(round.iter().zip(exact).all(near), "{what}, kept");
                    assert!(round != exact, "{what}, kept in bf16");
                }
                let [mut at_gate, mut at_up] = round;
                let at_gated = down.backward(&dy, Precision::Bf16);
                let pieces = [&mut at_gate, &mut at_up].map(|numbers| Rewritten::InPlace(numbers));
                let [g, u] = pieces;
                gates::backward(g, u, &at_gated, activation);
                let (expected, ()) = filled(x.len(), |dx| {
                    backward(&[(&gate, &at_gate), (&up, &at_up)], Precision::Bf16, dx);
                });
                let (dx, ()) = filled(x.len(), |dx| all.backward(unit, &kept, &dy, dx));
                assert!(dx == expected, "{what}, back");
            }
        }
    }
}
