//! Our own mistakes: a panic becomes a report that can be sent, and exit code 2.

use std::backtrace::Backtrace;
use std::fmt::Write;
use std::fs;
use std::panic::{self, PanicHookInfo};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Of the panic that came last: some are caught and mean nothing, as that of a driver without a card.
static LAST: Mutex<Option<String>> = Mutex::new(None);
/// Where reports lie.
static FOLDER: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Notes every panic from now on. One that becomes an error is told as that, and as nothing else.
pub fn install() {
    let print = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if pronk_data::is_guarded() {
            return;
        }
        print(info);
        *LAST.lock().unwrap_or_else(PoisonError::into_inner) = Some(description(info));
    }));
}

/// From now on reports are written into `folder`, not into the system's folder for temporary files.
pub fn report_into(folder: &Path) {
    *FOLDER.lock().unwrap_or_else(PoisonError::into_inner) = Some(folder.to_owned());
}

/// Writes the report of the last panic. Returns what to tell the user.
pub fn report() -> String {
    let folder = FOLDER.lock().unwrap_or_else(PoisonError::into_inner).take();
    let last = LAST.lock().unwrap_or_else(PoisonError::into_inner).take();
    let name = format!("pronk-report-{}.txt", std::process::id());
    let text = last.unwrap_or_default();
    let written = [folder, Some(std::env::temp_dir())].into_iter().flatten().find_map(|folder| {
        let path = folder.join(&name);
        fs::write(&path, &text).ok().map(|()| path)
    });
    let report = match written {
        Some(path) => format!("the report in {}", path.display()),
        None => "the lines above".into(),
    };
    format!(
        "\nThis is a bug in pronk, not a mistake of yours. Please send {report} to\n{}/issues. It holds the command line, \
         and neither data nor weights.",
        env!("CARGO_PKG_REPOSITORY")
    )
}

fn description(info: &PanicHookInfo) -> String {
    let mut text = format!(
        "pronk {} on {} {}\n\n",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::OS,
        std::env::consts::ARCH
    );
    let arguments: Vec<String> = std::env::args_os().map(|a| a.to_string_lossy().into_owned()).collect();
    let thread = std::thread::current();
    let backtrace = Backtrace::force_capture();
    let _ = writeln!(
        text,
        "command: {arguments:?}\nthread: {}\n{info}\n\n{backtrace}",
        thread.name().unwrap_or("unnamed")
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_a_report() {
        let folder = tempfile::tempdir().unwrap();
        install();
        report_into(folder.path());
        assert!(panic::catch_unwind(|| panic!("the wool is {}", "gone")).is_err());
        let told = report();
        let path = fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        assert!(told.contains(path.to_str().unwrap()) && told.contains("/issues"), "{told}");
        for part in [
            "the wool is gone",
            "internal_error.rs",
            "command: [",
            env!("CARGO_PKG_VERSION"),
            "a_panic_becomes",
        ] {
            assert!(text.contains(part), "{part} is not in:\n{text}");
        }
    }
}
