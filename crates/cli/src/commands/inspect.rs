use std::fmt::Write;
use std::path::Path;

use miette::{IntoDiagnostic, Result, WrapErr, miette};
use pronk_data::checks::Shown;
use pronk_data::{Check, ExampleView, Finding, PreparedDataset, TextTokenizer};
use pronk_lora::ForwardMode;
use pronk_model::LoadConfig;
use safetensors::{Dtype, tensor::TensorView};

use super::prep;
use crate::base::{self, OpenedBase};
use crate::terminal::{print, stdout_has_colour};

/// `pronk inspect data`: the summary, and what would spoil a run.
pub fn data(file: &Path, base: Option<&str>, allow: &[Check]) -> Result<()> {
    let prepared = PreparedDataset::read(file).into_diagnostic()?;
    print(&prep::summary(&prepared.report));
    let opened = base_of(&prepared, base, "the checks read tokens as text")?;
    let findings = pronk_data::check(&prepared, &opened.tokenizer).into_diagnostic()?;
    print(&findings.iter().map(|finding| outcome(finding, allow)).collect::<String>());
    let failed: Vec<String> =
        findings.iter().filter(|f| f.fails() && !allow.contains(&f.check)).map(complaint).collect();
    if failed.is_empty() {
        return Ok(());
    }
    Err(miette!(
        "{}: {} of {} checks failed\n{}",
        file.display(),
        failed.len(),
        findings.len(),
        failed.join("\n")
    ))
}

/// A line for a check, with the first rows that it found below it.
fn outcome(finding: &Finding, allow: &[Check]) -> String {
    let Finding { check, count, of, shown } = finding;
    let verdict = match (finding.fails(), count) {
        (true, _) if allow.contains(check) => "allowed",
        (true, _) => "FAILED",
        (false, 0) => "ok",
        (false, _) => "let pass",
    };
    let mut text = format!("{:<20}{verdict:<10}", check.to_string());
    if *count > 0 {
        let _ = write!(text, "{count} of {of} ({:.2} %)", 100.0 * finding.share());
    }
    text = format!("{}\n", text.trim_end());
    for Shown { row, what } in shown {
        let place = row.map_or_else(String::new, |row| format!("row {row}: "));
        let _ = writeln!(text, "    {place}{what}");
    }
    if *count > shown.len() && !shown.is_empty() {
        text += "    ..\n";
    }
    text
}

/// What a failed check found, expected, and what to do.
fn complaint(finding: &Finding) -> String {
    let Finding { check, count, of, shown } = finding;
    let rows: Vec<String> = shown.iter().filter_map(|shown| Some(shown.row?.to_string())).collect();
    let rows = match rows.as_slice() {
        [] => String::new(),
        [one] => format!(", row {one}"),
        several => {
            format!(", rows {}{}", several.join(", "), if *count > several.len() { " .." } else { "" })
        }
    };
    let expected = match check.let_pass() {
        0.0 => "none".to_owned(),
        share => format!("at most {} %", 100.0 * share),
    };
    format!(
        "{check}: {count} of {of}{rows}; expected {expected}: {}. To accept it: --allow {check}",
        check.advice()
    )
}

/// The base that `prepared` was made with, or the one that is named.
fn base_of(prepared: &PreparedDataset, named: Option<&str>, why: &str) -> Result<OpenedBase> {
    match named.or(prepared.report.base.as_deref()) {
        Some(base) => base::open(base, Path::new(".")),
        None => Err(miette!("{why}: add --base with the base the file was prepared for")),
    }
}

/// `pronk inspect data --row`
pub fn row(file: &Path, row: usize, base: Option<&str>) -> Result<()> {
    let prepared = PreparedDataset::read(file).into_diagnostic()?;
    let train = prepared.train.len();
    let rows = train + prepared.validation.len();
    let example = if row < train { prepared.train.get(row) } else { prepared.validation.get(row - train) };
    let Some(example) = example else {
        return Err(miette!("--row {row}: {} has {rows} rows, counted from 0", file.display()));
    };
    let opened = base_of(&prepared, base, "--row shows tokens as text")?;
    let held_out = if row < train { "" } else { ", held out" };
    print(&format!("row {row}{held_out}: {} tokens, {} learned\n", example.tokens(), example.supervised()));
    print(&tokens(example, &opened.tokenizer, stdout_has_colour()));
    Ok(())
}

/// Each token with its id, prompt and response told apart by colour and by a mark.
fn tokens(example: ExampleView, tokenizer: &TextTokenizer, colour: bool) -> String {
    let mut text = String::new();
    for (&id, &learned) in example.token_ids.iter().zip(example.loss_mask) {
        let spelled = tokenizer.token(id).unwrap_or_else(|| "(no such token)".into());
        let plain = tokenizer.decode_with_specials(&[id]).unwrap_or_default();
        let mark = if learned { "response" } else { "prompt  " };
        let note = match id {
            id if tokenizer.eos_ids().contains(&id) => " EOS",
            id if Some(id) == tokenizer.bos() => " BOS",
            _ => "",
        };
        let (on, off) = match (colour, learned) {
            (false, _) => ("", ""),
            (true, true) => ("\x1b[32m", "\x1b[0m"),
            (true, false) => ("\x1b[2;36m", "\x1b[0m"),
        };
        let _ = writeln!(text, "{on}{mark} {id:>7} {plain:?} {spelled}{note}{off}");
    }
    text
}

/// `pronk inspect logits`
pub fn logits(name: &str, adapter: Option<&Path>, text: &str, out: &Path, device: &str) -> Result<()> {
    let opened = base::open(name, Path::new("."))?;
    let opened = adapter.into_iter().try_fold(opened, OpenedBase::of_adapter)?;
    let ids = opened.tokenizer.encode_prompt(text).into_diagnostic()?;
    if ids.is_empty() {
        return Err(miette!("--text: expected at least one token, found none"));
    }
    opened.must_embed(ids.iter().max().copied())?;
    let decoder = opened.load(device, LoadConfig::default())?;
    let adapter = adapter.map(|dir| opened.load_adapter(dir, &decoder)).transpose()?;
    let logits = decoder.logits(&ids, ForwardMode::inference(adapter.as_ref()));
    let shape = logits.dims().to_vec();
    let values: Vec<f32> = logits.try_into_vec_as().map_err(|e| miette!("{e}"))?;
    let values: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
    let token_ids: Vec<u8> = ids.iter().flat_map(|&id| i64::from(id).to_le_bytes()).collect();
    let views = [
        ("token_ids", TensorView::new(Dtype::I64, vec![ids.len()], &token_ids).into_diagnostic()?),
        ("logits", TensorView::new(Dtype::F32, shape, &values).into_diagnostic()?),
    ];
    let bytes = safetensors::serialize(views, None).into_diagnostic()?;
    pronk_files::write(out, &bytes).into_diagnostic().wrap_err_with(|| out.display().to_string())
}
