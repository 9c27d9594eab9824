use std::alloc::{GlobalAlloc, Layout, System};

use crate::cache_line::LINE;

/// The system's allocator, whose larger blocks begin where a line of the cache does: a register of 64 bytes is then
/// written into one line and not into two. A program makes it its global allocator.
///
/// The system's own way to ask for that alignment asks for more than it keeps, and finds a block that was freed too
/// small for another of its size. Here every block of a size is asked for alike: a line longer, with the distance from
/// its beginning right before what is handed out.
#[derive(Debug)]
pub struct Heap;

/// Bytes from which on a block is worth it.
const LARGE: usize = 4096;

// SAFETY: blocks that begin on a line lie within blocks of the system's, which are given back with the layout that they
// were made with; all others are the system's.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promises.
        unsafe {
            match around(layout) {
                Some(whole) => on_line(System.alloc(whole)),
                None => System.alloc(layout),
            }
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promises.
        unsafe {
            match around(layout) {
                Some(whole) => on_line(System.alloc_zeroed(whole)),
                None => System.alloc_zeroed(layout),
            }
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises; before a block on a line stands how far into the system's it begins.
        unsafe {
            match around(layout) {
                Some(whole) => System.dealloc(block.sub(distance(block).read()), whole),
                None => System.dealloc(block, layout),
            }
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as the caller promises, who has seen to it that the size makes a layout.
        unsafe {
            let wanted = Layout::from_size_align_unchecked(size, layout.align());
            if around(layout).is_none() && around(wanted).is_none() {
                return System.realloc(block, layout, size);
            }
            let moved = self.alloc(wanted);
            if !moved.is_null() {
                moved.copy_from_nonoverlapping(block, layout.size().min(size));
                self.dealloc(block, layout);
            }
            moved
        }
    }
}

/// What is asked of the system for a block that is to begin on a line; none for other blocks.
fn around(layout: Layout) -> Option<Layout> {
    let worth_it = layout.size() >= LARGE && layout.align() < LINE;
    let whole = || Layout::from_size_align(layout.size().checked_add(LINE)?, 16).ok();
    worth_it.then(whole).flatten()
}

/// The first line in a block of the system's, behind its distance from the beginning: from 16 bytes on, as the system's
/// blocks begin at multiples of 16.
///
/// # Safety
/// `whole` is null, or was made by a layout of [`around`].
#[allow(unsafe_code)]
unsafe fn on_line(whole: *mut u8) -> *mut u8 {
    if whole.is_null() {
        return whole;
    }
    let far = LINE - whole as usize % LINE;
    // SAFETY: the block is a line longer than what was asked for.
    unsafe {
        let block = whole.add(far);
        distance(block).write(far);
        block
    }
}

/// Where it stands how far into the system's block `block` begins, which begins on a line.
#[allow(clippy::cast_ptr_alignment)] // of a line
fn distance(block: *mut u8) -> *mut usize {
    block.cast::<usize>().wrapping_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(bytes: &mut [u8]) {
        bytes.iter_mut().enumerate().for_each(|(i, byte)| *byte = i as u8);
    }

    /// Sizes on both sides of what is large, with small and large alignments of their own.
    #[test]
    #[allow(unsafe_code)]
    fn blocks_begin_on_lines_and_keep_what_is_in_them() {
        let sizes = [1, LARGE - 1, LARGE, LARGE + 1, 3 * LARGE, 1 << 20];
        for (size, align) in
            sizes.into_iter().flat_map(|size| [1, 4, 16, 64, 4096].map(|align| (size, align)))
        {
            let layout = Layout::from_size_align(size, align).unwrap();
            // SAFETY: each block is used within its size and given back once, with its layout.
            unsafe {
                let block = Heap.alloc_zeroed(layout);
                let bytes = std::slice::from_raw_parts_mut(block, size);
                assert!(bytes.iter().all(|&byte| byte == 0), "{layout:?}");
                fill(bytes);
                let mut now = (block, layout);
                for other in sizes {
                    let before = now.1.size();
                    now.0 = Heap.realloc(now.0, now.1, other);
                    now.1 = Layout::from_size_align(other, align).unwrap();
                    let line = if other < LARGE { align } else { align.max(LINE) };
                    assert_eq!(now.0 as usize % line, 0, "{layout:?}, then {other}");
                    let bytes = std::slice::from_raw_parts_mut(now.0, other);
                    let mut kept = bytes[..other.min(before)].iter().enumerate();
                    assert!(kept.all(|(i, &byte)| byte == i as u8), "{layout:?}, then {other}");
                    fill(bytes);
                }
                Heap.dealloc(now.0, now.1);
            }
        }
    }
}
