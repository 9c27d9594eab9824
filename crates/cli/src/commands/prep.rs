use std::fmt::Write;
use std::path::Path;

use miette::{IntoDiagnostic, Result, miette};
use pronk_data::{PrepareConfig, PrepareReport, PreparedDataset, prepare};

use crate::args::Prep;
use crate::terminal::print;
use crate::{
    base::{self, OpenedBase},
    progress,
};

/// `pronk prep`
pub fn run(args: Prep) -> Result<()> {
    check_destination(&args.out)?;
    let opened = base::open(&args.base, Path::new("."))?;
    let config = PrepareConfig {
        files: args.data,
        template: args.template,
        max_seq_len: args.max_seq_len,
        train_on_inputs: args.train_on_inputs,
        val_size: args.val_size,
        skip_bad: args.skip_bad,
    };
    let prepared = with_bar(&config, &opened)?;
    opened.must_embed(prepared.train.max_token_id().max(prepared.validation.max_token_id()))?;
    // A link stays a link: the file it leads to is replaced.
    let out = std::fs::canonicalize(&args.out).unwrap_or_else(|_| args.out.clone());
    prepared.write(&out).into_diagnostic()?;
    print(&summary(&prepared.report));
    print(&format!("wrote {}\n", args.out.display()));
    Ok(())
}

/// Refuses, before any work, a place where no file can be written. The finished file is renamed to
/// its name, which would put it in the place of a device such as `/dev/stdout`.
fn check_destination(out: &Path) -> Result<()> {
    if out.exists() && !out.is_file() {
        let found = if out.is_dir() { "a directory" } else { "a device" };
        return Err(miette!("--out {}: expected the name of a file, found {found}", out.display()));
    }
    match std::path::absolute(out).into_diagnostic()?.parent() {
        Some(folder) if !folder.exists() => {
            Err(miette!("--out {}: there is no folder {}; make it first", out.display(), folder.display()))
        }
        _ => Ok(()),
    }
}

/// Prepares with a bar on the terminal.
pub fn with_bar(config: &PrepareConfig, opened: &OpenedBase) -> Result<PreparedDataset> {
    let bar = progress::bar("preparing the data", 0);
    let prepared = prepare(config, &opened.tokenizer, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    let mut prepared = prepared.into_diagnostic()?;
    prepared.report.base = Some(opened.lasting_name());
    Ok(prepared)
}

/// The table that sums a prepared data set up.
pub fn summary(report: &PrepareReport) -> String {
    let mut table = String::new();
    let mut row = |name: &str, value: String| {
        let _ = writeln!(table, "{name:<24}{value:>12}");
    };
    row("records", report.records.to_string());
    row("rows to train on", report.train_rows.to_string());
    row("rows held out", report.validation_rows.to_string());
    row("tokens", report.tokens.to_string());
    row("supervised tokens", report.supervised_tokens.to_string());
    row("longest row", report.longest.to_string());
    row("truncated", report.truncated.to_string());
    for (reason, count) in &report.dropped {
        row(&format!("dropped: {reason}"), count.to_string());
    }
    row("bad records skipped", report.bad_records.to_string());
    row("duplicates", report.duplicates.to_string());
    row("empty outputs", report.empty_outputs.to_string());
    for (field, count) in &report.ignored_fields {
        row(&format!("ignored field '{field}'"), count.to_string());
    }
    let most = report.length_histogram.iter().map(|b| b.rows).max().unwrap_or(0).max(1);
    for bucket in &report.length_histogram {
        let bar = "█".repeat((bucket.rows * 40).div_ceil(most));
        let _ = writeln!(table, "up to {:>5} tokens      {:>12} {bar}", bucket.up_to, bucket.rows);
    }
    table
}
