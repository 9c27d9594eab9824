//! Products of small bf16 tiles with float32 sums, on processors that have an instruction for it.
//!
//! Both instruction sets want the same thing, so both share one layout. A *tile* is 1 KiB: on the
//! left 16 rows of 32 numbers, on the right 16 rows of 16 pairs, the pairs being two neighbours
//! along the summed dimension. [`Multiplier::multiply_block`] sums the products of two strips of left tiles
//! with two strips of right tiles into 32 x 32 numbers.

#![allow(unsafe_code)] // instructions that compilers do not choose by themselves

use std::sync::OnceLock;

/// Rows of a left tile, columns of a right one.
pub(crate) const SIDE: usize = 16;
/// Numbers that a tile sums over.
pub(crate) const DEPTH: usize = 32;
/// Numbers in a tile.
pub(crate) const TILE: usize = SIDE * DEPTH;
/// Rows and columns of what [`Multiplier::multiply_block`] computes.
pub(crate) const BLOCK: usize = 2 * SIDE;

/// What multiplies bf16 on this processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bf16Unit {
    /// Intel's tile unit, from Sapphire Rapids on.
    Amx,
    /// `vdpbf16ps`: Cooper Lake and Sapphire Rapids, AMD from Zen 4 on.
    Avx512,
}

impl Bf16Unit {
    /// The best unit there is, if any. Asked of the processor once.
    pub(crate) fn detect() -> Option<Self> {
        static FOUND: OnceLock<Option<Bf16Unit>> = OnceLock::new();
        *FOUND.get_or_init(detect)
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Option<Bf16Unit> {
    None
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Option<Bf16Unit> {
    let avx512 = is_x86_feature_detected!("avx512bf16")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl");
    if !avx512 {
        return None;
    }
    Some(if amx::available() { Bf16Unit::Amx } else { Bf16Unit::Avx512 })
}

/// Strips of tiles that lie one behind another, for one [`Multiplier::multiply_block`].
#[derive(Clone, Copy)]
pub(crate) struct Strips<'a> {
    /// Rows 0 to 15 and 16 to 31 of the left side.
    pub left: [&'a [u16]; 2],
    /// Columns 0 to 15 and 16 to 31 of the right side.
    pub right: [&'a [u16]; 2],
}

/// 32 x 32 numbers, in rows that lie `stride` numbers apart.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sums {
    pub start: *mut f32,
    pub stride: usize,
}

/// A thread's right to multiply: the tile unit has to be set up for each thread.
pub(crate) struct Multiplier {
    unit: Bf16Unit,
}

impl Multiplier {
    pub(crate) fn new(unit: Bf16Unit) -> Self {
        #[cfg(target_arch = "x86_64")]
        if unit == Bf16Unit::Amx {
            amx::configure();
        }
        Self { unit }
    }

    /// The nearest bf16 of each of `numbers`, halves to even.
    #[allow(clippy::unused_self)] // a multiplier is the proof that the instruction is there
    pub(crate) fn round(&self, numbers: &[f32], out: &mut [u16]) {
        let (blocks, rest) = numbers.as_chunks::<DEPTH>();
        let (out_blocks, out_rest) = out.as_chunks_mut::<DEPTH>();
        for (numbers, out) in blocks.iter().zip(out_blocks) {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: whichever unit was detected, avx512bf16 was.
            unsafe {
                avx512::round(numbers, out);
            }
            #[cfg(not(target_arch = "x86_64"))]
            unreachable!("no unit is ever detected here: {numbers:?} {out:?}");
        }
        for (&x, out) in rest.iter().zip(out_rest) {
            *out = round(x);
        }
    }

    /// A right tile from 16 rows that begin `stride` numbers apart in `rows`: they become its columns.
    ///
    /// # Panics
    /// Where the last row ends too early.
    #[allow(clippy::unused_self)] // as above
    pub(crate) fn turn(&self, rows: &[u16], stride: usize, tile: &mut [u16; TILE]) {
        assert!(rows.len() >= (SIDE - 1) * stride + DEPTH, "16 rows of 32 numbers");
        #[cfg(target_arch = "x86_64")]
        // SAFETY: whichever unit was detected, avx512f was; the rows are there by the assertion.
        unsafe {
            avx512::turn(rows.as_ptr(), stride, tile);
        }
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("no unit is ever detected here: {tile:?}");
    }

    /// A row of a right tile: 16 numbers of one row of a matrix, each with the one below it.
    #[allow(clippy::unused_self)] // as above
    pub(crate) fn pair(&self, even: &[u16; SIDE], odd: &[u16; SIDE], pairs: &mut [u16; DEPTH]) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: whichever unit was detected, avx512f was.
        unsafe {
            avx512::pair(even, odd, pairs);
        }
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("no unit is ever detected here: {even:?} {odd:?} {pairs:?}");
    }

    /// `sums = left * right`, added to what is there unless `fresh`, where `sums` is 32 x 32 in rows
    /// that lie `stride` numbers apart.
    ///
    /// # Panics
    /// Where the strips differ in length or `sums` is too short.
    pub(crate) fn multiply_block(&self, strips: Strips<'_>, fresh: bool, sums: &mut [f32], stride: usize) {
        assert!(stride >= BLOCK && sums.len() >= (BLOCK - 1) * stride + BLOCK, "room for 32 x 32 sums");
        let sums = Sums { start: sums.as_mut_ptr(), stride };
        // SAFETY: both lie within the slice by the assertion, or are one.
        unsafe { self.multiply_to(strips, (!fresh).then_some(sums), sums) };
    }

    /// `sums = before + left * right`, or without `before` the product alone.
    ///
    /// # Safety
    /// `before` can be read and `sums` can be written, by this thread alone; they are one or do not overlap.
    ///
    /// # Panics
    /// Where the strips differ in length.
    pub(crate) unsafe fn multiply_to(&self, strips: Strips<'_>, before: Option<Sums>, sums: Sums) {
        let numbers = strips.left[0].len();
        let equal = strips.left.iter().chain(&strips.right).all(|s| s.len() == numbers);
        assert!(equal && numbers.is_multiple_of(TILE), "strips of one length, in whole tiles");
        let tiles = numbers / TILE;
        assert!(tiles > 0, "something to sum over");
        #[cfg(target_arch = "x86_64")]
        match self.unit {
            // SAFETY: the unit was detected, the thread configured, the lengths are checked above, and the rest is asked
            // of the caller.
            Bf16Unit::Amx => unsafe { amx::multiply(strips, tiles, before, sums) },
            // SAFETY: as above.
            Bf16Unit::Avx512 => unsafe { avx512::multiply(strips, tiles, before, sums) },
        }
        #[cfg(not(target_arch = "x86_64"))]
        unreachable!("no unit is ever detected here: {:?}, {tiles}, {before:?} {sums:?}", self.unit);
    }
}

/// Has the processor fetch memory that will be read soon.
pub(crate) fn prefetch(bytes: &[u8]) {
    const LINE: usize = 64;
    #[cfg(target_arch = "x86_64")]
    for line in bytes.chunks(LINE) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, which reads nothing into the program.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (bytes, LINE);
}

/// The nearest bf16, halves to even. NaN stays NaN.
#[inline]
pub(crate) fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() { 0x7fc0 } else { (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16 }
}

impl Drop for Multiplier {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        if self.unit == Bf16Unit::Amx {
            amx::release();
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod amx {
    use std::arch::asm;
    use std::arch::x86_64::__cpuid_count;

    use super::{SIDE, Strips, Sums, TILE};

    /// Whether the processor has tiles for bf16 and the system lets this process use them.
    pub(super) fn available() -> bool {
        // Leaf 7 of the Intel manual: bit 22 of edx is AMX-BF16, bit 24 AMX-TILE.
        let features = __cpuid_count(7, 0).edx;
        features & (1 << 22) != 0 && features & (1 << 24) != 0 && permitted()
    }

    /// Asks Linux for the tile registers, which a process has to do once.
    #[cfg(target_os = "linux")]
    fn permitted() -> bool {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        // SAFETY: a request with two integers; it touches no memory of ours.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
    }

    #[cfg(not(target_os = "linux"))]
    fn permitted() -> bool {
        false
    }

    /// Palette 1 with all eight registers 16 rows of 64 bytes.
    #[repr(C, align(64))]
    struct TileConfig {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        bytes_per_row: [u16; 16],
        rows: [u8; 16],
    }

    pub(super) fn configure() {
        let mut config =
            TileConfig { palette: 1, start_row: 0, reserved: [0; 14], bytes_per_row: [0; 16], rows: [0; 16] };
        config.bytes_per_row[..8].fill(64);
        config.rows[..8].fill(SIDE as u8);
        // SAFETY: `available` has found the unit; the instruction reads 64 bytes of `config`.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) };
    }

    pub(super) fn release() {
        // SAFETY: `available` has found the unit; the instruction only resets its registers.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }

    /// Asks for the tile after next behind a register, line by line: the tile unit's loads are not foreseen by the
    /// processor. Beyond a strip's end they fetch something else, or nothing.
    macro_rules! prefetch {
        ($register:literal) => {
            prefetch!($register; 0 64 128 192 256 320 384 448 512 576 640 704 768 832 896 960)
        };
        ($register:literal; $($line:literal)*) => {
            concat!($("prefetcht0 [{", $register, "} + 2048 + ", $line, "]\n"),*)
        };
    }

    /// # Safety
    /// The thread is configured, all strips hold `tiles` tiles, and of `before` and `sums` what
    /// [`super::Multiplier::multiply_to`] says.
    pub(super) unsafe fn multiply(strips: Strips<'_>, tiles: usize, before: Option<Sums>, sums: Sums) {
        let [a0, a1] = strips.left.map(<[u16]>::as_ptr);
        let [b0, b1] = strips.right.map(<[u16]>::as_ptr);
        let (fresh, before) = (before.is_none(), before.unwrap_or(sums));
        // SAFETY: by the contract above; every load stays within `tiles` tiles of its strip, and the lower 16 rows of
        // 32 begin 16 rows below the upper ones.
        unsafe {
            asm!(
                "test {fresh}, {fresh}",
                "jnz 3f",
                "tileloadd tmm0, [{c} + {ldc}*1]",
                "tileloadd tmm1, [{c} + {ldc}*1 + 64]",
                "mov {fresh}, {ldc}",
                "shl {fresh}, 4",
                "add {c}, {fresh}",
                "tileloadd tmm2, [{c} + {ldc}*1]",
                "tileloadd tmm3, [{c} + {ldc}*1 + 64]",
                "jmp 2f",
                "3:",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{a0} + {row}*1]",
                "tileloadd tmm6, [{b0} + {row}*1]",
                prefetch!("b0"),
                "tileloadd tmm7, [{b1} + {row}*1]",
                prefetch!("b1"),
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{a1} + {row}*1]",
                prefetch!("a0"),
                "tdpbf16ps tmm1, tmm4, tmm7",
                prefetch!("a1"),
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a0}, {tile}",
                "add {a1}, {tile}",
                "add {b0}, {tile}",
                "add {b1}, {tile}",
                "dec {n}",
                "jnz 2b",
                "tilestored [{d} + {ldd}*1], tmm0",
                "tilestored [{d} + {ldd}*1 + 64], tmm1",
                "mov {fresh}, {ldd}",
                "shl {fresh}, 4",
                "add {d}, {fresh}",
                "tilestored [{d} + {ldd}*1], tmm2",
                "tilestored [{d} + {ldd}*1 + 64], tmm3",
                fresh = inout(reg) usize::from(fresh) => _,
                c = inout(reg) before.start => _,
                ldc = in(reg) before.stride * 4,
                d = inout(reg) sums.start => _,
                ldd = in(reg) sums.stride * 4,
                row = in(reg) 64_usize,
                a0 = inout(reg) a0 => _,
                a1 = inout(reg) a1 => _,
                b0 = inout(reg) b0 => _,
                b1 = inout(reg) b1 => _,
                n = inout(reg) tiles => _,
                tile = const TILE * 2,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm256_loadu_si256, _mm512_cvtepu16_epi32, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps,
        _mm512_loadu_ps, _mm512_loadu_si512, _mm512_or_si512, _mm512_set1_epi32, _mm512_setzero_ps,
        _mm512_shuffle_i32x4, _mm512_slli_epi32, _mm512_storeu_ps, _mm512_storeu_si512,
        _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
    };
    use std::mem::transmute;

    use super::{BLOCK, DEPTH, SIDE, Strips, Sums, TILE};

    /// Rows at a time: 8 rows of two registers leave room for their factors in 32 registers.
    const ROWS: usize = 8;

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn round(numbers: &[f32; DEPTH], out: &mut [u16; DEPTH]) {
        // SAFETY: two registers of 16 numbers are read, one of 32 is written.
        unsafe {
            let low = _mm512_loadu_ps(numbers.as_ptr());
            let high = _mm512_loadu_ps(numbers.as_ptr().add(SIDE));
            let halves: __m512i = transmute(_mm512_cvtne2ps_pbh(high, low));
            _mm512_storeu_si512(out.as_mut_ptr().cast(), halves);
        }
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn pair(even: &[u16; SIDE], odd: &[u16; SIDE], pairs: &mut [u16; DEPTH]) {
        // SAFETY: two registers of 16 numbers are read, one of 32 is written.
        unsafe {
            let low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(even.as_ptr().cast()));
            let high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(odd.as_ptr().cast()));
            let both = _mm512_or_si512(low, _mm512_slli_epi32::<16>(high));
            _mm512_storeu_si512(pairs.as_mut_ptr().cast(), both);
        }
    }

    /// Transposes 16 x 16 pairs: four registers at a time within their quarters, then the quarters.
    ///
    /// # Safety
    /// avx512f is there, and 32 numbers can be read at each of 16 rows `stride` apart.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn turn(rows: *const u16, stride: usize, tile: &mut [u16; TILE]) {
        // SAFETY: by the contract above; the 16 stores fill the tile.
        unsafe {
            let rows: [__m512i; SIDE] =
                std::array::from_fn(|i| _mm512_loadu_si512(rows.add(i * stride).cast()));
            // In quarter q of `quarters[4 * i + k]`: pair 4 * q + k of rows 4 * i to 4 * i + 3.
            let mut quarters = rows;
            for i in 0..4 {
                let [a, b, c, d] = [rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3]];
                let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
                quarters[4 * i] = _mm512_unpacklo_epi64(ab, cd);
                quarters[4 * i + 1] = _mm512_unpackhi_epi64(ab, cd);
                let (ab, cd) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
                quarters[4 * i + 2] = _mm512_unpacklo_epi64(ab, cd);
                quarters[4 * i + 3] = _mm512_unpackhi_epi64(ab, cd);
            }
            let mut store = |pair: usize, pairs: __m512i| {
                _mm512_storeu_si512(tile.as_mut_ptr().add(pair * DEPTH).cast(), pairs);
            };
            for k in 0..4 {
                let [a, b, c, d] = [quarters[k], quarters[4 + k], quarters[8 + k], quarters[12 + k]];
                let even = [_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0x88>(c, d)];
                let odd = [_mm512_shuffle_i32x4::<0xdd>(a, b), _mm512_shuffle_i32x4::<0xdd>(c, d)];
                store(k, _mm512_shuffle_i32x4::<0x88>(even[0], even[1]));
                store(4 + k, _mm512_shuffle_i32x4::<0x88>(odd[0], odd[1]));
                store(8 + k, _mm512_shuffle_i32x4::<0xdd>(even[0], even[1]));
                store(12 + k, _mm512_shuffle_i32x4::<0xdd>(odd[0], odd[1]));
            }
        }
    }

    /// # Safety
    /// avx512f and avx512bf16 are there, all strips hold `tiles` tiles, and of `before` and `sums` what
    /// [`super::Multiplier::multiply_to`] says.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn multiply(strips: Strips<'_>, tiles: usize, before: Option<Sums>, sums: Sums) {
        let [b0, b1] = strips.right.map(<[u16]>::as_ptr);
        for top in (0..BLOCK).step_by(ROWS) {
            let a = strips.left[top / SIDE].as_ptr();
            // SAFETY: by the contract above; offsets stay within the strips and the 32 x 32 sums.
            unsafe {
                let a = a.add(top % SIDE * DEPTH);
                let mut low = [_mm512_setzero_ps(); ROWS];
                let mut high = low;
                if let Some(Sums { start, stride }) = before {
                    let c = start.add(top * stride);
                    low = std::array::from_fn(|r| _mm512_loadu_ps(c.add(r * stride)));
                    high = std::array::from_fn(|r| _mm512_loadu_ps(c.add(r * stride + SIDE)));
                }
                for tile in 0..tiles {
                    for pair in 0..SIDE {
                        let at = tile * TILE + pair * DEPTH;
                        let right0: __m512bh = transmute(_mm512_loadu_si512(b0.add(at).cast()));
                        let right1: __m512bh = transmute(_mm512_loadu_si512(b1.add(at).cast()));
                        for r in 0..ROWS {
                            #[allow(clippy::cast_ptr_alignment)] // it is read unaligned
                            let factor = a.add(tile * TILE + r * DEPTH + pair * 2).cast::<i32>();
                            let left: __m512bh = transmute(_mm512_set1_epi32(factor.read_unaligned()));
                            low[r] = _mm512_dpbf16_ps(low[r], left, right0);
                            high[r] = _mm512_dpbf16_ps(high[r], left, right1);
                        }
                    }
                }
                let c = sums.start.add(top * sums.stride);
                for r in 0..ROWS {
                    _mm512_storeu_ps(c.add(r * sums.stride), low[r]);
                    _mm512_storeu_ps(c.add(r * sums.stride + SIDE), high[r]);
                }
            }
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
#[allow(clippy::float_cmp)] // small whole numbers, exact in every format
mod tests {
    use super::*;

    /// Small whole numbers, whose products and sums are exact in every format.
    #[test]
    fn both_units_sum_the_products_of_their_tiles() {
        let units = match Bf16Unit::detect() {
            None => Vec::new(),
            Some(Bf16Unit::Avx512) => vec![Bf16Unit::Avx512],
            Some(Bf16Unit::Amx) => vec![Bf16Unit::Amx, Bf16Unit::Avx512],
        };
        let number = |i: usize| ((i * 7 + i / 5) % 9) as f32 - 4.0;
        let tiles = 3;
        let strip = |seed: usize| -> Vec<u16> {
            (0..tiles * TILE).map(|i| (number(i + seed).to_bits() >> 16) as u16).collect()
        };
        let (left, right) = ([strip(0), strip(1)], [strip(2), strip(3)]);
        let strips = Strips { left: [&left[0], &left[1]], right: [&right[0], &right[1]] };
        let value = |half: u16| f32::from_bits(u32::from(half) << 16);
        let expected = |i: usize, j: usize| -> f32 {
            let (a, b) = (&left[i / SIDE], &right[j / SIDE]);
            let at = |k: usize| {
                let (tile, k) = (k / DEPTH * TILE, k % DEPTH);
                let a = value(a[tile + i % SIDE * DEPTH + k]);
                a * value(b[tile + k / 2 * DEPTH + j % SIDE * 2 + k % 2])
            };
            (0..tiles * DEPTH).map(at).sum()
        };
        for unit in units {
            let multiplier = Multiplier::new(unit);
            let stride = BLOCK + 3;
            let mut sums = vec![1.0; BLOCK * stride];
            for (fresh, before) in [(false, 1.0), (true, 0.0)] {
                multiplier.multiply_block(strips, fresh, &mut sums, stride);
                for (i, j) in (0..BLOCK).flat_map(|i| (0..BLOCK).map(move |j| (i, j))) {
                    assert_eq!(sums[i * stride + j], expected(i, j) + before, "{unit:?} at {i}, {j}");
                }
            }
        }
    }

    #[test]
    fn right_tiles_hold_rows_turned_and_rows_paired() {
        let Some(unit) = Bf16Unit::detect() else { return };
        let multiplier = Multiplier::new(unit);
        let stride = DEPTH + 7;
        let rows: Vec<u16> = (0..(SIDE * stride) as u16).collect();
        let mut tile = [0; TILE];
        multiplier.turn(&rows, stride, &mut tile);
        for (row, k) in (0..SIDE).flat_map(|row| (0..DEPTH).map(move |k| (row, k))) {
            assert_eq!(tile[k / 2 * DEPTH + row * 2 + k % 2], rows[row * stride + k], "{row}, {k}");
        }
        let (even, odd) = (std::array::from_fn(|i| i as u16), std::array::from_fn(|i| 60_000 + i as u16));
        let mut pairs = [0; DEPTH];
        multiplier.pair(&even, &odd, &mut pairs);
        for i in 0..SIDE {
            assert_eq!(pairs[2 * i..][..2], [even[i], odd[i]]);
        }
    }

    #[test]
    fn rounding_is_to_nearest_and_to_even() {
        let Some(unit) = Bf16Unit::detect() else { return };
        let numbers: Vec<f32> = (0..67).map(|i| 1.0 + i as f32 / 1024.0).chain([f32::NAN, -0.0]).collect();
        let mut rounded = vec![0; numbers.len()];
        Multiplier::new(unit).round(&numbers, &mut rounded);
        for (x, y) in numbers.iter().zip(rounded) {
            assert_eq!(half::bf16::from_f32(*x).is_nan(), x.is_nan());
            assert!(x.is_nan() || half::bf16::from_f32(*x).to_bits() == y, "{x}");
        }
    }
}
