mod lines;

#[cfg(all(target_os = "linux", target_env = "gnu"))]
use rayon::prelude::*;

pub use lines::Heap;

/// Has the allocator keep the memory that results of operations were in, for the next results.
/// Call it once, at the start of the program.
///
/// glibc gives every large block back to the system when it is freed, and asks for it anew; each
/// page is then filled with zeros before an operation writes it, which takes longer than most of
/// the arithmetic here. Other allocators are left as they are.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt changes two settings of the allocator, whichever threads there are.
    #[allow(unsafe_code)]
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0); // all blocks from the heap, which is kept
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1); // to its end
    }
}

/// Has the system hand out `bytes` of memory at once, for what is going to be computed: page by page, as each is touched,
/// it takes several times as long. What [`keep_freed_memory`] asks for has to be in force, or nothing is won.
pub fn take_memory(bytes: usize) {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: the advice, which an old system refuses, is about whole pages of a block that is ours until it is freed,
    // and changes nothing in them.
    #[allow(unsafe_code)]
    unsafe {
        const PIECE: usize = 16 << 20;
        let page = usize::try_from(libc::sysconf(libc::_SC_PAGESIZE)).unwrap_or(PIECE);
        let block = libc::malloc(bytes);
        let (start, end) = ((block as usize).next_multiple_of(page), block as usize + bytes);
        if !block.is_null() {
            (start..end).into_par_iter().step_by(PIECE).for_each(|at| {
                libc::madvise(at as *mut libc::c_void, PIECE.min(end - at), libc::MADV_POPULATE_WRITE);
            });
        }
        libc::free(block);
    }
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    let _ = bytes;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// There is nothing to see of it from inside: that it returns, and touches nothing but its own block.
    #[test]
    #[cfg_attr(miri, ignore = "Miri has no madvise")]
    fn memory_of_every_size_is_taken_and_given_back() {
        for bytes in [0, 1, 4096, 100_000, (32 << 20) + 5] {
            take_memory(bytes);
        }
    }
}
