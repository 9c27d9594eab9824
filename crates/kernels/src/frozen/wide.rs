//! Loops compiled more than once: binaries are built for any x86-64, and processors with wider
//! vectors run the same loop over those.

/// `widest!(|| ..)` runs a closure without arguments, compiled for the widest vectors that this processor has. Results are the
/// same everywhere: Rust contracts no products and sums.
///
/// Loops in it are `for` loops: what iterates by itself, as `collect`, `extend` and at times `for_each` do, may stay a function
/// by itself, compiled for any processor.
///
/// A macro, because each processor has to have a closure of its own: one that is called in several places stays a function
/// by itself, compiled for any processor.
macro_rules! widest {
    ($f:expr) => {
        match $crate::frozen::wide::Vectors::detect() {
            $crate::frozen::wide::Vectors::Avx512(vectors) => vectors.run($f),
            $crate::frozen::wide::Vectors::Avx2(vectors) => vectors.run($f),
            $crate::frozen::wide::Vectors::Any => ($f)(),
        }
    };
}
pub(crate) use widest;

/// The vectors of this processor.
#[derive(Clone, Copy)]
pub enum Vectors {
    Avx512(Avx512),
    Avx2(Avx2),
    Any,
}

impl Vectors {
    /// The widest ones.
    #[inline]
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                return Self::Avx512(Avx512(()));
            }
            if is_x86_feature_detected!("avx2") {
                return Self::Avx2(Avx2(()));
            }
        }
        Self::Any
    }
}

/// The proof that they were detected.
#[derive(Clone, Copy)]
pub struct Avx512(());

/// The proof that they were detected.
#[derive(Clone, Copy)]
pub struct Avx2(());

// `inline` all along: else they are compiled with this module's code, away from the closure.
impl Avx512 {
    #[inline]
    #[allow(clippy::unused_self)] // it is the proof
    pub fn run<R>(self, f: impl FnOnce() -> R) -> R {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has every feature that the function is compiled for.
        #[allow(unsafe_code)]
        unsafe {
            avx512(f)
        }
        #[cfg(not(target_arch = "x86_64"))]
        f()
    }
}

impl Avx2 {
    #[inline]
    #[allow(clippy::unused_self)] // it is the proof
    pub fn run<R>(self, f: impl FnOnce() -> R) -> R {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        #[allow(unsafe_code)]
        unsafe {
            avx2(f)
        }
        #[cfg(not(target_arch = "x86_64"))]
        f()
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn avx512<R>(f: impl FnOnce() -> R) -> R {
    f()
}

#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
fn avx2<R>(f: impl FnOnce() -> R) -> R {
    f()
}
