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

/// A panic that becomes an error is told as that, and as nothing else.
pub fn quiet_guarded_panics() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !pronk_data::is_guarded() {
            usual(panic);
        }
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

/// Whether standard output shows colours.
pub fn stdout_has_colour() -> bool {
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none()
}

/// Set by the first Ctrl-C (or SIGTERM, or SIGHUP), which is answered with what happens now; a second
/// one ends the process at once.
pub fn stop_on_signal(what_happens: &'static str) -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if seen.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("\n{what_happens}; press Ctrl-C again to stop at once");
    })
    .into_diagnostic()?;
    Ok(stop)
}
