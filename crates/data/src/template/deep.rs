//! A stack for what recurses as deep as a template likes: minijinja's parser follows the source, and values within each
//! other are written, compared and dropped level by level. A stack that overflows ends the process, and no error can be
//! made of that; so there is room for as many levels as `MAX_SOURCE` and the fuel allow.

use std::cell::Cell;
use std::panic::resume_unwind;
use std::thread::{self, Builder, Scope, ScopedJoinHandle};

/// Of the address space; of memory only what is used.
const STACK: usize = 512 << 20;

thread_local! {
    static DEEP: Cell<bool> = const { Cell::new(false) };
}

/// A thread of `scope` with such a stack.
pub fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    run: impl FnOnce() -> T + Send + 'scope,
) -> std::io::Result<ScopedJoinHandle<'scope, T>> {
    Builder::new().stack_size(STACK).spawn_scoped(scope, || {
        DEEP.set(true);
        run()
    })
}

/// Runs `run` on such a stack: on this thread's, where it is one.
pub fn deep<T: Send>(run: impl FnOnce() -> T + Send) -> std::io::Result<T> {
    if DEEP.get() {
        return Ok(run());
    }
    thread::scope(|scope| Ok(spawn(scope, run)?.join().unwrap_or_else(|panic| resume_unwind(panic))))
}
