//! The threads that operations are shared among: rayon's.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rayon::Yield;

/// Makes the calling thread, which is to compute, one of those that operations are shared among: otherwise it sleeps
/// through each of its operations, of which a step has a thousand, and to be woken takes as long as a small one.
/// Call it once, at the start of the program.
///
/// Where there is to be one thread only, nothing changes: somebody has to compute for others while this one waits for
/// them.
pub fn compute_on_this_thread() {
    let asked = std::env::var("RAYON_NUM_THREADS").ok().and_then(|threads| threads.parse().ok());
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = asked.filter(|&threads| threads > 0).unwrap_or_else(cores);
    if threads > 1 {
        // Fails where there are workers already, with which everything works as well.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).use_current_thread().build_global();
    }
}

/// How long threads without work look for some before they sleep: longer than what one thread does between two
/// operations, and so short that nobody waits for a disk in this way. It also ends what would never: whoever looks for work
/// may do so in the midst of other work, which has to go on.
const PATIENCE: Duration = Duration::from_micros(200);

/// Whether all threads are looking for work, as far as is known.
static AWAKE: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// Whether this thread is.
    static LOOKING: Cell<bool> = const { Cell::new(false) };
}

/// Has the other threads look for work without sleeping until there has been none for a while. rayon's own patience is
/// shorter than what lies between two operations, and to wake a thread costs the one that computes more than a small
/// operation.
pub(crate) fn stay_awake() {
    if rayon::current_num_threads() == 1 || AWAKE.swap(true, Ordering::Relaxed) {
        return;
    }
    let computing = rayon::current_thread_index();
    rayon::spawn_broadcast(move |thread| {
        if Some(thread.index()) != computing && !LOOKING.replace(true) {
            look_for_work();
            LOOKING.set(false);
            AWAKE.store(false, Ordering::Relaxed);
        }
    });
}

/// Does what there is to do until there has been nothing for a while.
fn look_for_work() {
    let mut last = Instant::now();
    while last.elapsed() < PATIENCE {
        if rayon::yield_now() == Some(Yield::Executed) {
            last = Instant::now();
        } else {
            // Whoever else has something to do on this core comes first.
            thread::yield_now();
        }
    }
}
