//! Memory that a thread keeps from one task to the next: fresh memory would cost more than what is computed in it.

/// `length` numbers to be overwritten, what is left of earlier ones. The memory only grows: what is shrunk is filled with
/// zeros when it grows again.
pub(crate) fn grown<T: Copy + Default>(memory: &mut Vec<T>, length: usize) -> &mut [T] {
    if memory.len() < length {
        memory.resize(length, T::default());
    }
    &mut memory[..length]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_grows_and_keeps_what_is_in_it() {
        let mut memory = vec![1_u8; 3];
        assert_eq!(grown(&mut memory, 2), [1, 1]);
        assert_eq!(grown(&mut memory, 4), [1, 1, 1, 0]);
        assert_eq!(memory.len(), 4);
    }
}
