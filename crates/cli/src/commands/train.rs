use std::path::{Path, PathBuf};
use std::process::ExitCode;

use miette::{IntoDiagnostic, Result, miette};
use pronk_train::{Ending, RunFolder, Summary};

use crate::args::Train;
use crate::base;
use crate::loaded::{LoadedRun, PREPARED};
use crate::profile::listen;
use crate::progress::TrainingProgress;
use crate::recipe::Recipe;
use crate::terminal::print;

/// `pronk train`
pub fn run(args: &Train) -> Result<ExitCode> {
    let recipe_path = match (&args.recipe, &args.resume) {
        (Some(recipe), _) => recipe.clone(),
        (None, Some(run)) => RunFolder::open(run).into_diagnostic()?.recipe(),
        (None, None) => return Err(miette!("expected a recipe, or --resume with a run's folder")),
    };
    let recipe = Recipe::read(&recipe_path, &args.set)?;
    let _trace = args.profile.as_deref().map(|file| listen(Some(file), None)).transpose()?;
    let opened = base::open(&recipe.base.path, Path::new("."))?;
    let resumes = args.resume.is_some();
    let (folder, unused) = match &args.resume {
        Some(run) => (RunFolder::open(run).into_diagnostic()?, None),
        None => new_folder(&recipe, &recipe_path).map(|(folder, unused)| (folder, Some(unused)))?,
    };
    let Some(loaded) = LoadedRun::load(recipe, opened, &args.device.device, &folder, resumes)? else {
        return Ok(stopped_early());
    };
    let mut trainer = loaded.trainer(folder.clone())?;
    let mut progress = TrainingProgress::new(0, trainer.total_steps());
    if resumes {
        trainer = trainer.resume(&mut progress).into_diagnostic()?;
        progress = TrainingProgress::new(trainer.step_number(), trainer.total_steps());
    }
    let mut unused = unused.map(Unused::keep);
    let ending = trainer.run(&mut progress, &loaded.stop).into_diagnostic();
    progress.finish();
    if let (Err(_), Some(unused), 0) = (&ending, &mut unused, trainer.step_number()) {
        unused.armed = true;
    }
    Ok(report(&ending?, &folder))
}

/// A new run's folder with the resolved recipe in it.
fn new_folder(recipe: &Recipe, recipe_path: &Path) -> Result<(RunFolder, Unused)> {
    let text = recipe.to_toml()?;
    let dir = &recipe.run.dir;
    let own = std::fs::canonicalize(dir.join("recipe.toml")).ok();
    if own.is_some() && own == std::fs::canonicalize(recipe_path).ok() {
        return Err(miette!(
            "run.dir: {} holds {} itself, which the resolved recipe would replace; expected another folder",
            dir.display(),
            recipe_path.display()
        ));
    }
    let unused = Unused::before(dir);
    let folder = RunFolder::create(dir).into_diagnostic()?;
    RunFolder::write(&folder.recipe(), text.as_bytes()).into_diagnostic()?;
    Ok((folder, unused))
}

/// What a new run has made so far; removed again unless it gets past its first step, so that a
/// mistake in the data or a device that is not there leaves nothing behind.
struct Unused {
    /// Whether to remove it. Not while training: a bug of ours must not take the results along.
    armed: bool,
    files: Vec<PathBuf>,
    /// Only where there were none: those of another run are not ours to remove.
    checkpoints: Option<PathBuf>,
    folders: Vec<PathBuf>,
}

impl Unused {
    /// Looks at the run's folder before anything is made.
    fn before(dir: &Path) -> Self {
        let absent = |path: &PathBuf| !path.exists();
        let names = ["recipe.toml", PREPARED, "samples.md", "metrics.jsonl"];
        let files = names.map(|name| dir.join(name));
        Self {
            armed: true,
            files: files.into_iter().filter(absent).collect(),
            checkpoints: Some(dir.join("checkpoints")).filter(absent),
            folders: dir.ancestors().map(Path::to_owned).take_while(absent).collect(),
        }
    }

    fn keep(mut self) -> Self {
        self.armed = false;
        self
    }
}

impl Drop for Unused {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        if let Some(checkpoints) = &self.checkpoints {
            let _ = std::fs::remove_dir_all(checkpoints); // the one before the first step, if it came so far
        }
        for file in &self.files {
            let _ = std::fs::remove_file(file); // it may not have been made
        }
        for folder in &self.folders {
            // Somebody else may have put something there by now; then it stays.
            let _ = std::fs::remove_dir(folder);
        }
    }
}

/// Ctrl-C before there was anything to save.
fn stopped_early() -> ExitCode {
    print("stopped before the first step; nothing is left behind\n");
    ExitCode::from(130)
}

fn report(ending: &Ending, folder: &RunFolder) -> ExitCode {
    let at = |path: PathBuf| path.display().to_string();
    match ending {
        Ending::Finished(Summary { steps, eval_before, best }) => {
            let mut text = format!("finished {steps} steps\n");
            if let (Some(before), Some((after, step))) = (eval_before, best) {
                text += &format!("eval loss {before:.4} before, {after:.4} after (lowest, at step {step})\n");
            }
            text += &format!("adapter   {}\nsamples   {}\n", at(folder.adapter()), at(folder.samples()));
            print(&text);
            ExitCode::SUCCESS
        }
        Ending::Interrupted { step, saved } => {
            let root = folder.root().display();
            print(&if *saved {
                format!("stopped after step {step}; go on with: pronk train --resume {root}\n")
            } else {
                format!("stopped after step {step}; nothing was saved, as train.save_steps is 0\n")
            });
            ExitCode::from(130)
        }
    }
}
