//! Where templates run. minijinja's parser follows the source, and values within each other are written, compared and
//! dropped level by level. A stack that overflows ends the process, and no error can be made of that; so there is room
//! for as many levels as `MAX_SOURCE` and the fuel allow. And values that hold others twice, which do so too, can be
//! compared for years in a single step, which no fuel ends; so there is a time too.

use std::cell::Cell;
use std::io;
use std::panic::resume_unwind;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{Builder, Scope};
use std::time::Duration;

/// Of the address space; of memory only what is used.
const STACK: usize = 512 << 20;
/// What takes this long takes forever: a rendering is done in less than a millisecond.
pub const PATIENCE: Duration = Duration::from_secs(5);

thread_local! {
    static DEEP: Cell<bool> = const { Cell::new(false) };
}

/// Runs `run` in `scope` on such a stack, for as long as it takes.
pub fn spawn<'scope>(scope: &'scope Scope<'scope, '_>, run: impl FnOnce() + Send + 'scope) -> io::Result<()> {
    let run = || {
        DEEP.set(true);
        run();
    };
    Builder::new().stack_size(STACK).spawn_scoped(scope, run).map(drop)
}

/// Runs `run` on such a stack: on this thread's, where it is one; else on a thread that is given up, and left behind,
/// when its time is over.
pub fn deep<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    if DEEP.get() {
        return Ok(run());
    }
    let (done, result) = mpsc::channel();
    let run = move || {
        DEEP.set(true);
        // Nobody listens any more where it took too long.
        let _ = done.send(run());
    };
    let thread = Builder::new().stack_size(STACK).spawn(run)?;
    match result.recv_timeout(PATIENCE) {
        Ok(value) => Ok(value),
        Err(RecvTimeoutError::Timeout) => Err(io::ErrorKind::TimedOut.into()),
        Err(RecvTimeoutError::Disconnected) => match thread.join() {
            Err(panic) => resume_unwind(panic),
            Ok(()) => Err(io::ErrorKind::Other.into()),
        },
    }
}
