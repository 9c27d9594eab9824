//! Matrices in bf16, packed into the tiles that processors multiply; sums are float32.

mod packing;
mod tiles;

pub(crate) use packing::{RoundedRows, left_strip, paired_rows, turned_rows};
pub(crate) use tiles::{BLOCK, Bf16Unit, DEPTH, Multiplier, SIDE, Strips, Sums, TILE, round};
