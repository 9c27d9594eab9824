//! Intel's tile unit.

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
