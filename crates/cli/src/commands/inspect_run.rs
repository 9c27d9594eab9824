use std::fmt::Write;
use std::fs;
use std::path::Path;

use miette::{IntoDiagnostic, Result, WrapErr};
use pronk_train::{RunFolder, StepRecord};
use rasciigraph::{Config, plot};

use crate::run_lock::RunLock;
use crate::terminal::print;

/// Columns and lines of the chart.
const CHART: (usize, u32) = (72, 10);

/// `pronk inspect run`
pub fn run(dir: &Path) -> Result<()> {
    let folder = RunFolder::look(dir);
    let recipe = fs::read_to_string(folder.recipe());
    let recipe = recipe.into_diagnostic().wrap_err_with(|| folder.recipe().display().to_string())?;
    let mut text = format!("{recipe}\n");
    match RunLock::read(&folder)? {
        Some(lock) => text += &origins(&lock),
        None => text += "this run ended before anything was loaded\n",
    }
    let log = fs::read(folder.metrics()).unwrap_or_default();
    // Lines that are no steps are the base's own eval loss, and one that a killed process left half-written.
    let steps: Vec<StepRecord> =
        String::from_utf8_lossy(&log).lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    text += &losses(&steps);
    print(&text);
    Ok(())
}

/// What the run is made of, and who worked on it.
fn origins(lock: &RunLock) -> String {
    let mut text = String::new();
    let mut row = |what: &str, sha256: &str, of: &dyn std::fmt::Display| {
        let _ = writeln!(text, "{what:<7} {sha256:.16}  {of}");
    };
    row("recipe", &lock.recipe.sha256, &"recipe.toml");
    row("base", &lock.base.sha256, &lock.base.path.display());
    lock.data.iter().for_each(|file| row("data", &file.sha256, &file.path.display()));
    for session in &lock.sessions {
        let began =
            if session.step == 0 { "began".into() } else { format!("went on after step {}", session.step) };
        let (pronk, features, device) = (&session.pronk, session.features.join(","), &session.device);
        let _ = writeln!(text, "{}  {began}, pronk {pronk} ({features}) on {device}", session.started);
        session.accepted.iter().for_each(|change| {
            let _ = writeln!(text, "    accepted: {change}");
        });
    }
    text
}

fn losses(steps: &[StepRecord]) -> String {
    let Some(last) = steps.last() else { return "no step is done yet\n".into() };
    let finite: Vec<f64> = steps.iter().map(|step| step.loss).filter(|loss| loss.is_finite()).collect();
    let mut text = format!("\nloss of {} steps\n", last.step);
    if finite.len() > 1 {
        // Each column shows the mean of its steps, so that no step is left out.
        let columns = finite.len().min(CHART.0);
        let column = |i: usize| {
            let part =
                finite.get(i * finite.len() / columns..(i + 1) * finite.len() / columns).unwrap_or_default();
            part.iter().sum::<f64>() / part.len() as f64
        };
        text += &plot((0..columns).map(column).collect(), Config::default().with_height(CHART.1));
        text += "\n\n";
    }
    let evals = steps.iter().filter_map(|step| Some((step.eval_loss?, step.step)));
    if let Some((loss, step)) = evals.min_by(|a, b| a.0.total_cmp(&b.0)) {
        let _ = writeln!(text, "lowest eval loss {loss:.4}, after step {step}");
    }
    if let Some(skipped) = steps.iter().filter_map(|step| step.skipped).max() {
        let _ = writeln!(text, "{skipped} steps skipped, as their loss or their gradients were no numbers");
    }
    text
}
