//! Standard output and error as a person, or a pipe, reads them.

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use miette::{GraphicalTheme, IntoDiagnostic, MietteHandlerOpts, Report, Result, miette};
use pronk_model::Staging;

/// Errors as one message with its causes; colours only on a terminal, lines never wrapped, so
/// that they can be searched.
pub fn install_error_style() {
    let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let theme = if colour { GraphicalTheme::unicode() } else { GraphicalTheme::unicode_nocolor() };
    // The only failure is a second installation.
    let _ = miette::set_hook(Box::new(move |_| {
        let options = MietteHandlerOpts::new().graphical_theme(theme.clone()).wrap_lines(false).width(400);
        Box::new(options.build())
    }));
}

/// The same message with its causes, less those whose words stand in the message above them
/// already: libraries name the system's answer both in their text and as its cause.
pub fn without_repetition(report: &Report) -> Report {
    let mut told: Vec<String> = Vec::new();
    for cause in report.chain().map(ToString::to_string) {
        if !told.last().is_some_and(|above| above.contains(&cause)) {
            told.push(cause);
        }
    }
    let innermost = told.pop().unwrap_or_default();
    told.into_iter().rev().fold(miette!("{innermost}"), Report::wrap_err)
}

/// Writes to standard output. A reader that has gone away (`pronk ... | head`) is no error.
pub fn print(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Writes a line to standard error. A terminal that was closed is no error: the run goes on without it.
pub fn say(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// The same for what may be of use.
pub fn note(message: &str) {
    say(&format!("note: {message}"));
}

/// The same for what is not as it should be, where the command goes on.
pub fn warn(message: &str) {
    say(&format!("warning: {message}"));
}

/// Whether standard output shows colours.
pub fn stdout_has_colour() -> bool {
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none()
}

/// Ends the process at the first Ctrl-C, or signal of those below, with all removed that was half-written.
pub fn end_on_signal() -> Result<()> {
    on_signal(|_| end())
}

/// Set by the first Ctrl-C, by SIGTERM, SIGHUP, and SIGUSR1, with which batch systems warn of the end, and answered
/// with `what_happens` now. A second Ctrl-C ends the process at once.
pub fn stop_on_signal(what_happens: &'static str) -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let set = Arc::clone(&stop);
    let mut interrupted = false;
    on_signal(move |is_ctrl_c| {
        if is_ctrl_c && std::mem::replace(&mut interrupted, true) {
            end();
        }
        if !set.swap(true, Ordering::Relaxed) {
            let presses = if interrupted { "again" } else { "twice" };
            say(&format!("\n{what_happens}; press Ctrl-C {presses} to stop at once"));
        }
    })?;
    Ok(stop)
}

fn end() -> ! {
    Staging::abandon_all();
    std::process::exit(130)
}

/// Has `hear` called, on a thread of its own, for each signal that asks for the end, with whether it is Ctrl-C.
#[cfg(unix)]
fn on_signal(mut hear: impl FnMut(bool) + Send + 'static) -> Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
    use signal_hook::iterator::Signals;

    let heard = [SIGINT, SIGTERM, SIGHUP, SIGUSR1].into_iter().filter(|&signal| !is_ignored(signal));
    let mut signals = Signals::new(heard).into_diagnostic()?;
    std::thread::spawn(move || signals.forever().for_each(|signal| hear(signal == SIGINT)));
    Ok(())
}

/// Has `hear` called for each Ctrl-C.
#[cfg(not(unix))]
fn on_signal(mut hear: impl FnMut(bool) + Send + 'static) -> Result<()> {
    ctrlc::set_handler(move || hear(true)).into_diagnostic()
}

/// Whether this process was started to ignore `signal`, as `nohup` has it ignore that the terminal is closed.
#[cfg(unix)]
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask & (1 << (signal - 1)) != 0
}
