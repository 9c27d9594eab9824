use std::sync::LazyLock;

use rayon::prelude::*;

use crate::DYNAMIC_MAP;

/// Numbers that share a scale, as in bitsandbytes' optimizers.
const BLOCK: usize = 256;

/// The unsigned dynamic map: as the signed one, with all codes above zero, and so twice as many.
static UNSIGNED_MAP: LazyLock<Vec<f32>> = LazyLock::new(|| {
    let decade = |power: i32| {
        let parts = 1 << (power + 7);
        let middle = move |part: i32| 0.1 + 0.9 * (f64::from(part) + 0.5) / f64::from(parts);
        (0..parts).map(move |part| (middle(part) * 10_f64.powi(power)) as f32)
    };
    [0.0].into_iter().chain((-6..=0).flat_map(decade)).chain([1.0]).collect()
});

/// Numbers in 8 bits: a code of the dynamic map for each, and the largest magnitude of every block
/// of 256 (Dettmers et al. 2022, <https://arxiv.org/abs/2110.02861>).
#[derive(Debug, Clone, PartialEq)]
pub struct Blockwise {
    /// A code a number.
    pub codes: Vec<u8>,
    /// A scale a block.
    pub absmax: Vec<f32>,
    /// Whether there are numbers below zero.
    pub signed: bool,
}

impl Blockwise {
    /// `count` zeros.
    pub fn zeros(count: usize, signed: bool) -> Self {
        Self::quantize(&vec![0.0; count], signed)
    }

    /// Each number becomes the nearest of what the codes stand for at its block's scale.
    pub fn quantize(values: &[f32], signed: bool) -> Self {
        let map = map(signed);
        let mut codes = vec![0; values.len()];
        let blocks = codes.par_chunks_mut(BLOCK).zip(values.par_chunks(BLOCK));
        let absmax = blocks.map(|(codes, values)| {
            let absmax = values.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
            let scale = if absmax > 0.0 { absmax.recip() } else { 0.0 };
            for (code, value) in codes.iter_mut().zip(values) {
                *code = nearest(map, value * scale);
            }
            absmax
        });
        Self { absmax: absmax.collect(), codes, signed }
    }

    /// What the codes stand for.
    pub fn dequantize(&self) -> Vec<f32> {
        let map = map(self.signed);
        let blocks = self.codes.chunks(BLOCK).zip(&self.absmax);
        blocks
            .flat_map(|(codes, absmax)| codes.iter().map(move |&code| map[usize::from(code)] * absmax))
            .collect()
    }

    /// How many scales so many numbers have.
    pub fn blocks(count: usize) -> usize {
        count.div_ceil(BLOCK)
    }
}

fn map(signed: bool) -> &'static [f32] {
    if signed { &DYNAMIC_MAP } else { &UNSIGNED_MAP }
}

/// The code whose number is nearest to `x`; the lower of two.
fn nearest(map: &[f32], x: f32) -> u8 {
    let above = map.partition_point(|&number| number < x).min(map.len() - 1);
    let below = above.saturating_sub(1);
    (if x - map[below] <= map[above] - x { below } else { above }) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unsigned_map_is_bitsandbytes_own() {
        assert_eq!(UNSIGNED_MAP.len(), 256);
        assert!(UNSIGNED_MAP.is_sorted() && UNSIGNED_MAP[0] == 0.0 && UNSIGNED_MAP[255] >= 1.0);
        // From bitsandbytes.functional.create_dynamic_map(signed=False), version 0.50.2.
        for (code, number) in [
            (1, 3.25e-7),
            (2, 7.75e-7),
            (3, 2.125e-6),
            (100, 0.062_734_38),
            (200, 0.616_796_85),
            (254, 0.996_484_4),
        ] {
            let found = UNSIGNED_MAP[code];
            assert!((found / number - 1.0).abs() < 1e-5, "{code}: {found} {number}");
        }
    }

    #[test]
    fn numbers_come_back_as_near_as_eight_bits_go() {
        let numbers: Vec<f32> =
            (0..700).map(|i| ((i * 37 % 701) as f32 / 350.5 - 1.0).powi(3) * 5.0).collect();
        let absolute: Vec<f32> = numbers.iter().map(|x| x.abs()).collect();
        for (values, signed, off) in [(&numbers, true, 0.008), (&absolute, false, 0.004)] {
            let quantized = Blockwise::quantize(values, signed);
            assert_eq!((quantized.codes.len(), quantized.absmax.len()), (700, Blockwise::blocks(700)));
            let back = quantized.dequantize();
            for (block, (x, y)) in values.iter().zip(&back).enumerate().map(|(i, pair)| (i / BLOCK, pair)) {
                assert!((x - y).abs() <= off * quantized.absmax[block], "{x} {y}");
            }
            // The signed map ends in 1, and begins a little above -1.
            assert!(
                signed || Blockwise::quantize(&back, signed) == quantized,
                "what came back stays as it is"
            );
        }
        assert_eq!(Blockwise::zeros(300, true).dequantize(), vec![0.0; 300]);
    }
}
