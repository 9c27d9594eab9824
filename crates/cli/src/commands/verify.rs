use std::process::ExitCode;

use miette::{IntoDiagnostic, Result, miette};
use pronk_train::verify;

use crate::args::Verify;
use crate::terminal::print;

/// `pronk verify`
pub fn run(args: &Verify) -> Result<ExitCode> {
    let verified = verify(&args.dir).into_diagnostic()?;
    for (folder, files) in &verified.folders {
        print(&format!("{files:>4} files  {}\n", folder.display()));
    }
    let differences: Vec<String> =
        verified.differences.iter().map(|d| format!("{}: {}", d.path.display(), d.problem)).collect();
    if differences.is_empty() {
        print("every file is what was written\n");
        return Ok(ExitCode::SUCCESS);
    }
    Err(miette!("{} of these are not what was written:\n  {}", differences.len(), differences.join("\n  ")))
}
