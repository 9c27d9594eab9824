//! Where templates run. minijinja's parser follows the source, and values within each other are written, compared and
//! dropped level by level. A stack that overflows ends the process, and no error can be made of that; so there is room
//! for as many levels as `MAX_SOURCE` and the fuel allow. And values that hold others twice, which do so too, can be
//! compared for years in a single step, which no fuel ends; so there is a time too.

use std::cell::Cell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{self, Sender};
use std::thread::Builder;
use std::time::Duration;

/// Of the address space; of memory only what is used.
const STACK: usize = 512 << 20;
/// What takes this long takes forever: a rendering is done in less than a millisecond.
pub const PATIENCE: Duration = Duration::from_secs(5);

type Job = Box<dyn FnOnce() + Send>;

thread_local! {
    static DEEP: Cell<bool> = const { Cell::new(false) };
    /// The way to the thread with such a stack that works for this one, once there is one. It ends with this one.
    static HELPER: Cell<Option<Sender<Job>>> = const { Cell::new(None) };
}

/// Runs `run` on such a stack: on this thread's, where it is one; else on a thread that is given up, and left behind,
/// when its time is over. While all goes well it is the same for one call after another.
pub fn deep<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    if DEEP.get() {
        return Ok(run());
    }
    let helper = HELPER.take().map_or_else(new_helper, Ok)?;
    let (done, result) = mpsc::channel();
    let job = move || {
        // Nobody listens any more where it took too long.
        let _ = done.send(catch_unwind(AssertUnwindSafe(run)));
    };
    helper.send(Box::new(job)).map_err(|_| io::ErrorKind::Other)?;
    let outcome = result.recv_timeout(PATIENCE).map_err(|_| io::ErrorKind::TimedOut)?;
    HELPER.set(Some(helper));
    outcome.or_else(|panic| resume_unwind(panic))
}

fn new_helper() -> io::Result<Sender<Job>> {
    let (helper, jobs) = mpsc::channel::<Job>();
    Builder::new().stack_size(STACK).spawn(move || {
        DEEP.set(true);
        for job in jobs {
            job();
        }
    })?;
    Ok(helper)
}
