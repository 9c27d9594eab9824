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
