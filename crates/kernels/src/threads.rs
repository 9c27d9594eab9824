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
