//! Standard output and error as a person, or a pipe, reads them.

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use miette::{GraphicalTheme, IntoDiagnostic, MietteHandlerOpts, Report, Result, miette};

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

/// The same for what is not as it should be, where the command goes on.
pub fn warn(message: &str) {
    say(&format!("warning: {message}"));
}

/// Whether standard output shows colours.
pub fn stdout_has_colour() -> bool {
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none()
}

/// Set by the first Ctrl-C, by SIGTERM, SIGHUP, and SIGUSR1, with which batch systems warn of the end, and answered
/// with `what_happens` now. A second Ctrl-C ends the process at once.
#[cfg(unix)]
pub fn stop_on_signal(what_happens: &'static str) -> Result<Arc<AtomicBool>> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
    use signal_hook::iterator::Signals;

    let stop = Arc::new(AtomicBool::new(false));
    let set = Arc::clone(&stop);
    let heard = [SIGINT, SIGTERM, SIGHUP, SIGUSR1].into_iter().filter(|&signal| !is_ignored(signal));
    let mut signals = Signals::new(heard).into_diagnostic()?;
    std::thread::spawn(move || {
        let mut interrupted = false;
        for signal in signals.forever() {
            if signal == SIGINT && std::mem::replace(&mut interrupted, true) {
                std::process::exit(130);
            }
            if !set.swap(true, Ordering::Relaxed) {
                say(&format!(
                    "\n{what_happens}; press Ctrl-C {} to stop at once",
                    if interrupted { "again" } else { "twice" }
                ));
            }
        }
    });
    Ok(stop)
}

/// Whether this process was started to ignore `signal`, as `nohup` has it ignore that the terminal is closed.
#[cfg(unix)]
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask & (1 << (signal - 1)) != 0
}

/// Set by the first Ctrl-C, which is answered with what happens now; a second one ends the process at once.
#[cfg(not(unix))]
pub fn stop_on_signal(what_happens: &'static str) -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if seen.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        say(&format!("\n{what_happens}; press Ctrl-C again to stop at once"));
    })
    .into_diagnostic()?;
    Ok(stop)
}
