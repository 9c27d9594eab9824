/// The largest resident memory of this process so far, in bytes, by the operating system's own
/// account. `None` where the system does not tell (it is read from Linux' `/proc`).
pub fn peak_memory_bytes() -> Option<u64> {
    entry("/proc/self/status", "VmHWM:")
}

/// What programs could take before the system runs out, in bytes. `None` where it does not tell.
pub fn available_memory_bytes() -> Option<u64> {
    entry("/proc/meminfo", "MemAvailable:")
}

/// A line such as `VmHWM:  1234 kB`.
fn entry(file: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kilobytes: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kilobytes * 1024)
}
