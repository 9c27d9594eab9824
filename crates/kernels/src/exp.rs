//! The exponential function, and tanh, as a straight line of arithmetic, which compilers turn into
//! vectors: libm's are a call for every number.

// Loops that call it have to have it inside, to be compiled for the vectors they are.
#![allow(clippy::inline_always)]

/// Where results leave the normal numbers: `exp` stays at its value there.
const LOWEST: f32 = -87.33;
const HIGHEST: f32 = 88.37;

/// Added to a number below 2^22 and taken off again, it leaves the nearest whole number, which
/// also stands in the low bits of the sum.
const ROUND: f32 = 12_582_912.0;

/// `ln 2` in two parts. Few bits are set in the first, so that its product with a whole exponent
/// is exact.
const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];

/// `(e^r - 1 - r) / r^2` for `|r| <= ln(2) / 2`, highest power first (Moshier's Cephes).
const SERIES: [f32; 6] = [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];

/// `e^x` with a relative error below 2e-7 for `x` in `[-87.33, 88.37]`; beyond them, the value at
/// the nearer end. NaN stays NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let x = if x < LOWEST { LOWEST } else { x };
    let x = if x > HIGHEST { HIGHEST } else { x };
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let exponent = rounded - ROUND;
    let r = x - exponent * LN_2[0] - exponent * LN_2[1];
    let mut sum = SERIES[0];
    for coefficient in &SERIES[1..] {
        sum = sum * r + coefficient;
    }
    let fraction = sum * (r * r) + r + 1.0;
    // 2^exponent: the low bits of `rounded`, moved to where a float keeps its exponent.
    fraction * f32::from_bits((rounded.to_bits() << 23).wrapping_add(1.0_f32.to_bits()))
}

/// `(tanh(x) / x - 1) / x^2` for `|x| < 0.625`, highest power of `x^2` first (Moshier's Cephes).
#[allow(clippy::excessive_precision)] // as published
const TANH_SERIES: [f32; 5] =
    [-5.704_988_7e-3, 2.063_908_9e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328_2e-1];

/// `tanh x` with a relative error below 3e-7.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let square = x * x;
    let mut sum = TANH_SERIES[0];
    for coefficient in &TANH_SERIES[1..] {
        sum = sum * square + coefficient;
    }
    let near = sum * square * x + x;
    let far = (1.0 - 2.0 / (exp(2.0 * x.abs()) + 1.0)).copysign(x);
    // Both are computed, so that a loop stays without branches.
    if x.abs() < 0.625 { near } else { far }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which of all arguments are tried: under Miri there is time for few.
    const STEP: usize = if cfg!(miri) { 997 } else { 1 };

    #[test]
    #[allow(clippy::float_cmp)] // e^0 is exactly 1
    fn exponentials_are_good_to_2e7() {
        let mut worst = 0.0_f64;
        for i in (-873_200..=883_600).step_by(STEP) {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / exact - 1.0).abs());
        }
        println!("relative error {worst:.2e}");
        assert!(worst < 2e-7, "relative error {worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(f32::NEG_INFINITY) < 1.3e-38 && exp(f32::INFINITY) > 2e38);
    }

    #[test]
    #[allow(clippy::float_cmp)] // exact ends
    fn hyperbolic_tangents_are_good_to_3e7() {
        let mut worst = 0.0_f64;
        for i in (-200_000..=200_000).step_by(STEP) {
            let x = (i as f32 + 0.5) * 1e-4;
            worst = worst.max((f64::from(tanh(x)) / f64::from(x).tanh() - 1.0).abs());
        }
        println!("relative error {worst:.2e}");
        assert!(worst < 3e-7, "relative error {worst:e}");
        assert_eq!([tanh(0.0), tanh(1e30), tanh(f32::NEG_INFINITY)], [0.0, 1.0, -1.0]);
        assert!(tanh(f32::NAN).is_nan());
    }
}
