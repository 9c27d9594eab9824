use std::fmt::Write;
use std::path::Path;

use miette::{IntoDiagnostic, Result, miette};
use pronk_data::{Columns, PrepareConfig, PrepareReport, RowConfig, SpooledRows, prepare};

use crate::args::Prep;
use crate::terminal::print;
use crate::{
    base::{self, OpenedBase},
    datasets, progress,
};

/// `pronk prep`
pub fn run(args: Prep) -> Result<()> {
    check_destination(&args.out)?;
    let columns = columns(&args.column)?;
    let opened = base::open(&args.base, Path::new("."))?;
    let config = PrepareConfig {
        files: datasets::fetch(args.data.into_iter().map(Into::into).collect())?,
        format: args.format,
        columns,
        template: args.template,
        row: RowConfig {
            max_seq_len: args.max_seq_len,
            train_on_inputs: args.train_on_inputs,
            learn: args.learn,
        },
        val_size: args.val_size,
        skip_bad: args.skip_bad,
    };
    // A link stays a link: the file it leads to is replaced.
    let out = std::fs::canonicalize(&args.out).unwrap_or_else(|_| args.out.clone());
    let prepared = with_bar(&config, &opened, folder_of(&out))?;
    opened.must_embed(prepared.report.max_token_id)?;
    let summary = summary(&prepared.report);
    prepared.write(&out).into_diagnostic()?;
    print(&summary);
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
        Some(folder) if folder.exists() && !folder.is_dir() => {
            Err(miette!("--out {}: {} is no folder", out.display(), folder.display()))
        }
        Some(folder) if !folder.exists() => {
            Err(miette!("--out {}: there is no folder {}; make it first", out.display(), folder.display()))
        }
        _ => Ok(()),
    }
}

/// `--column instruction=question`, several times.
fn columns(named: &[String]) -> Result<Columns> {
    let mut table = toml::Table::new();
    for one in named {
        let (field, name) = one
            .split_once('=')
            .ok_or_else(|| miette!("--column {one}: expected FIELD=NAME, such as instruction=question"))?;
        table.insert(field.to_owned(), name.into());
    }
    table.try_into().map_err(|e: toml::de::Error| miette!("--column: {}", e.message()))
}

fn folder_of(file: &Path) -> &Path {
    file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Prepares with a bar on the terminal; the rows lie in `scratch` meanwhile.
pub fn with_bar(config: &PrepareConfig, opened: &OpenedBase, scratch: &Path) -> Result<SpooledRows> {
    let bar = progress::bar("preparing megabytes", 0);
    let prepared = prepare(config, &opened.tokenizer, scratch, &mut |done, total| {
        bar.set_length(total / 1_000_000);
        bar.set_position(done / 1_000_000);
    });
    bar.finish_and_clear();
    let mut prepared = prepared.into_diagnostic()?;
    prepared.report.base = Some(opened.lasting_name());
    Ok(prepared)
}

/// The table that sums a prepared data set up.
pub fn summary(report: &PrepareReport) -> String {
    let mut table: String = report.files.iter().map(|file| format!("{file}\n")).collect();
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
