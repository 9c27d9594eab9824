//! Products in bf16 with the two matrices of a gated feed-forward: they are gated while they are near, and kept in bf16 for
//! the way back, where their gradients are packed as they are computed.

use std::mem::MaybeUninit;
use std::ops::Range;

use rayon::prelude::*;

use super::FrozenMatrix;
use super::output::{Columns, Scratch};
use super::product::{TOKENS, columns_a_task};
use super::product_bf16::{
    BACKWARD_DEPTH, Cut, FORWARD_DEPTH, Packed, block_of, block_strips, packed_activations, packed_by,
    sum_of_products,
};
use crate::bf16::{BLOCK, Bf16Unit, Multiplier, SIDE, Strips, turned_rows};
use crate::glu::{Activation, gates};
use crate::threads::stay_awake;

// What is kept of a block is a turn.
const _: () = assert!(gates::TURN == BLOCK);

/// The matrices of one shape whose products are gated, one by the other.
#[derive(Clone, Copy)]
pub(super) struct Gated<'a> {
    pub gate: &'a FrozenMatrix,
    pub up: &'a FrozenMatrix,
    pub activation: Activation,
}

impl Gated<'_> {
    /// How many numbers are kept of a token.
    pub fn kept_a_token(self) -> usize {
        gates::kept_of(self.gate.shape()[0])
    }

    /// Writes `activation(x G^T) * (x U^T)` to all of `y`, and both products to all of `kept`, where that is there.
    ///
    /// # Panics
    /// Where `x` is not whole rows, or what is written is not as many.
    pub fn forward(
        self,
        unit: Bf16Unit,
        x: &[f32],
        y: &mut [MaybeUninit<f32>],
        mut kept: Option<&mut [MaybeUninit<u16>]>,
    ) {
        let ([rows, cols], kept_a_token) = (self.gate.shape(), self.kept_a_token());
        let tokens = x.len() / cols;
        assert_eq!([x.len(), y.len()], [tokens * cols, tokens * rows], "whole rows, as many of both");
        assert!(kept.as_ref().is_none_or(|kept| kept.len() == tokens * kept_a_token), "room for every token");
        stay_awake();
        for (x, y) in x.chunks(TOKENS * cols).zip(y.chunks_mut(TOKENS * rows)) {
            let tokens = x.len() / cols;
            let here = kept.as_mut().and_then(|kept| kept.split_off_mut(..tokens * kept_a_token));
            let (y, kept) = (Columns::of(y, rows), here.map(|kept| Columns::of(kept, kept_a_token)));
            let columns = columns_a_task(2 * rows, 2 * BLOCK) / 2;
            packed_activations(unit, &[(x, cols)], FORWARD_DEPTH, |left| {
                (0..rows.div_ceil(columns)).into_par_iter().for_each(|task| {
                    let here = task * columns..rows.min((task + 1) * columns);
                    self.forward_columns(unit, &left[0], tokens, here, y, kept);
                });
            });
        }
    }

    /// Columns `here` of both products, for a task: a pass along the summed dimension at a time.
    fn forward_columns(
        self,
        unit: Bf16Unit,
        left: &Packed,
        tokens: usize,
        here: Range<usize>,
        y: Columns<f32>,
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
                        let (tokens, columns) = (block_of(&(0..tokens), block), block_of(&here, side));
                        // SAFETY: these columns of the output, and what is kept of them, are this task's alone.
                        #[allow(unsafe_code)]
                        unsafe {
                            self.gate_block(&multiplier, sums, &tokens, &columns, y, kept);
                        }
                    }
                }
            }
        });
    }

    /// Writes what a block of both products becomes, and what is kept of it.
    ///
    /// # Safety
    /// No other task touches these columns.
    #[allow(unsafe_code)]
    unsafe fn gate_block(
        self,
        multiplier: &Multiplier,
        sums: &mut [[f32; BLOCK * BLOCK]; 2],
        tokens: &Range<usize>,
        columns: &Range<usize>,
        y: Columns<f32>,
        kept: Option<Columns<u16>>,
    ) {
        if let Some(kept) = kept {
            for (i, sums) in sums.iter().enumerate() {
                let mut rounded = [0; BLOCK * BLOCK];
                multiplier.round(sums, &mut rounded);
                let start = 2 * columns.start + i * BLOCK;
                for (token, row) in tokens.clone().zip(rounded.as_chunks::<BLOCK>().0) {
                    // SAFETY: by what is asked for.
                    unsafe { kept.copy(token, &(start..start + BLOCK), row) };
                }
            }
        }
        let [gate, up] = sums;
        gates::forward_piece(gate, up, self.activation);
        for (token, row) in tokens.clone().zip(gate.as_chunks::<BLOCK>().0) {
            // SAFETY: as above.
            unsafe { y.copy(token, columns, &row[..columns.len()]) };
        }
    }

    /// Writes the gradient at `x` to all of `dx`, from the products that [`Self::forward`] has kept.
    ///
    /// # Panics
    /// Where `dy` is not whole rows, `kept` not of as many tokens, or `dx` not as many.
    pub fn backward(self, unit: Bf16Unit, kept: &[u16], dy: &[f32], dx: &mut [MaybeUninit<f32>]) {
        let ([rows, cols], kept_a_token) = (self.gate.shape(), self.kept_a_token());
        let tokens = dy.len() / rows;
        let whole = [tokens * rows, tokens * kept_a_token, tokens * cols];
        assert_eq!([dy.len(), kept.len(), dx.len()], whole, "whole rows, as many of all");
        stay_awake();
        let chunks = dy.chunks(TOKENS * rows).zip(kept.chunks(TOKENS * kept_a_token));
        for ((dy, kept), dx) in chunks.zip(dx.chunks_mut(TOKENS * cols)) {
            let (tokens, cut) = (dy.len() / rows, Cut::new(dy.len(), rows, BACKWARD_DEPTH));
            packed_by(
                &[cut; 2],
                |memory| self.pack_gradients(unit, cut, kept, dy, memory),
                |left| sum_of_products(unit, &[self.gate, self.up], left, tokens, Columns::of(dx, cols)),
            );
        }
    }

    /// Packs the gradients at both products, of which `memory` holds one each.
    fn pack_gradients(self, unit: Bf16Unit, cut: Cut, kept: &[u16], dy: &[f32], memory: Vec<&mut [u16]>) {
        let (rows, kept_a_token) = (self.gate.shape()[0], self.kept_a_token());
        let mut memory = memory.into_iter().map(|memory| memory.chunks_mut(cut.strips * SIDE * cut.pass));
        let (Some(gate), Some(up)) = (memory.next(), memory.next()) else { return };
        for (pass, (gate, up)) in gate.zip(up).enumerate() {
            let summed = cut.summed(pass);
            let (strip, columns) = (SIDE * summed.len(), summed.start..rows.min(summed.end));
            let strips = gate.par_chunks_exact_mut(strip).zip(up.par_chunks_exact_mut(strip));
            strips.enumerate().for_each(|(strip, (gate, up))| {
                let multiplier = Multiplier::new(unit);
                Scratch::with(0, 0, 2 * columns.len(), |Scratch { numbers, .. }| {
                    let (at_gate, at_up) = numbers[..2 * columns.len()].split_at_mut(columns.len());
                    for row in 0..SIDE {
                        let token = strip * SIDE + row;
                        let Some(dy) = dy.chunks_exact(rows).nth(token) else {
                            multiplier.left_row(&[], gate, row);
                            multiplier.left_row(&[], up, row);
                            continue;
                        };
                        let kept = &kept[token * kept_a_token..][..kept_a_token][2 * columns.start..];
                        at_up.copy_from_slice(&dy[columns.clone()]);
                        gates::backward_kept_piece(kept, at_up, at_gate, self.activation);
                        multiplier.left_row(at_gate, gate, row);
                        multiplier.left_row(at_up, up, row);
                    }
                });
            });
        }
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
    fn products_are_gated_as_they_would_be_one_after_another() {
        let Some(unit) = Bf16Unit::detect() else { return };
        for ([rows, cols], tokens) in [([70, 33], 5), ([600, 40], 67), ([64, 1300], 33), ([33, 9], 1030)] {
            for activation in [Activation::Silu, Activation::GeluTanh] {
                let what = format!("{rows} x {cols}, {tokens} tokens, {activation:?}");
                let [gate, up] = [matrix([rows, cols], 1), matrix([rows, cols], 5)];
                let gated = Gated { gate: &gate, up: &up, activation };
                let (x, dy) = (numbers(tokens * cols, 2), numbers(tokens * rows, 3));
                let kept = tokens * gated.kept_a_token();
                let (kept, y) =
                    filled(kept, |kept| filled(dy.len(), |y| gated.forward(unit, &x, y, Some(kept))).0);

                let (gates, (ups, ())) = filled(dy.len(), |g| {
                    filled(dy.len(), |u| forward(vec![(&gate, g), (&up, u)], &x, None, Precision::Bf16))
                });
                let mut expected = gates.clone();
                gates::forward_piece(&mut expected, &ups, activation);
                assert!(y == expected, "{what}");
                let (unkept, ()) = filled(dy.len(), |y| gated.forward(unit, &x, y, None));
                assert!(unkept == expected, "{what}, nothing kept");

                let mut round = [Vec::new(), Vec::new()];
                for token in kept.chunks(gated.kept_a_token()) {
                    for (i, block) in token.chunks(BLOCK).enumerate() {
                        let left = BLOCK.min(rows - i / 2 * BLOCK);
                        round[i % 2].extend(block[..left].iter().map(|&half| wide(half)));
                    }
                }
                for (round, exact) in round.iter().zip([&gates, &ups]) {
                    let near = |(x, y): (&f32, &f32)| (x - y).abs() <= y.abs() / 256.0;
                    assert!(round.len() == exact.len() && round.iter().zip(exact).all(near), "{what}, kept");
                }
                let [mut at_gate, mut at_up] = round;
                let pieces = [&mut at_gate, &mut at_up].map(|numbers| Rewritten::InPlace(numbers));
                let [g, u] = pieces;
                gates::backward(g, u, &dy, activation);
                let (expected, ()) = filled(x.len(), |dx| {
                    backward(&[(&gate, &at_gate), (&up, &at_up)], Precision::Bf16, dx);
                });
                let (dx, ()) = filled(x.len(), |dx| gated.backward(unit, &kept, &dy, dx));
                assert!(dx == expected, "{what}, back");
            }
        }
    }
}
