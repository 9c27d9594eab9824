use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use miette::{IntoDiagnostic, Result, miette};
use pronk_train::{Ending, RunFolder, Summary};

use crate::args::Train;
use crate::base::{self, OpenedBase};
use crate::internal_error;
use crate::loaded::{LoadedRun, Start, write_recipe};
use crate::profile::listen;
use crate::progress::TrainingProgress;
use crate::recipe::Recipe;
use crate::run_lock::{LockedFile, RunLock, Session};
use crate::terminal::{note, print, say};

/// `pronk train`
pub fn run(args: &Train) -> Result<ExitCode> {
    let resumed = args.resume.as_deref().map(RunFolder::open).transpose().into_diagnostic()?;
    let recipe_path = match (&args.recipe, &resumed) {
        (Some(recipe), _) => recipe.clone(),
        (None, Some(run)) => run.recipe(),
        (None, None) => return Err(miette!("expected a recipe, or --resume with a run's folder")),
    };
    let recipe = Recipe::read(&recipe_path, &args.set)?;
    let _trace = args.profile.as_deref().map(|file| listen(Some(file), None)).transpose()?;
    let opened = base::of_recipe(&recipe)?;
    let (folder, unused, accepted) = match resumed {
        Some(run) => {
            let accepted = changes(&run, &recipe, &opened, args.accept_changes)?;
            (run, None, accepted)
        }
        None => {
            new_folder(&recipe, &recipe_path).map(|(folder, unused)| (folder, Some(unused), Vec::new()))?
        }
    };
    internal_error::report_into(folder.root());
    let start = match (&unused, args.accept_changes) {
        (Some(_), _) => Start::Anew,
        (None, false) => Start::GoesOn,
        (None, true) => Start::GoesOnChanged,
    };
    let Some(loaded) = LoadedRun::load(recipe, opened, &args.device.device, &folder)? else {
        return Ok(stopped_early());
    };
    let mut trainer = loaded.trainer(folder.clone(), start)?;
    let mut progress = TrainingProgress::new(trainer.step_number(), trainer.total_steps());
    loaded.write_down(&folder)?;
    begin_session(&folder, &loaded, Session::new(trainer.step_number(), &args.device.device, accepted))?;
    let mut unused = unused.map(Unused::keep);
    let ending = catch_unwind(AssertUnwindSafe(|| trainer.run(&mut progress, &loaded.stop)));
    progress.finish();
    let ending = ending.unwrap_or_else(|bug| {
        say(&format!("{}; go on with: pronk train --resume {}", trainer.kept(), folder.root().display()));
        resume_unwind(bug)
    });
    if let (Err(error), Some(unused), 0) = (&ending, &mut unused, trainer.step_number()) {
        unused.armed = !error.refers_to_the_run();
    }
    Ok(report(&ending.into_diagnostic()?, &folder))
}

/// What has changed since the run began. Unless the user accepts it, that is an error.
fn changes(folder: &RunFolder, recipe: &Recipe, opened: &OpenedBase, accept: bool) -> Result<Vec<String>> {
    let Some(began) = RunLock::read(folder)? else { return Ok(Vec::new()) };
    let changes = began.changes(&RunLock::new(recipe, LockedFile::of_base(&opened.base)?)?);
    if changes.is_empty() || accept {
        return Ok(changes);
    }
    Err(miette!(
        "{}: parts of this run have changed since this run began:\n  {}\nPut them back, start a new run in another \
         run.dir, or go on with them as they are by --accept-changes",
        folder.root().display(),
        changes.join("\n  ")
    ))
}

/// Writes down what the run is made of, and that it is taken up.
fn begin_session(folder: &RunFolder, loaded: &LoadedRun, session: Session) -> Result<()> {
    let before = RunLock::read(folder)?;
    if let Some(message) = before.as_ref().and_then(|lock| lock.last_session()?.differences(&session)) {
        note(&message);
    }
    let mut lock = loaded.lock.clone();
    lock.sessions = before.map(|lock| lock.sessions).unwrap_or_default();
    lock.sessions.push(session);
    lock.write(folder)
}

/// A new run's folder with the resolved recipe in it.
fn new_folder(recipe: &Recipe, recipe_path: &Path) -> Result<(RunFolder, Unused)> {
    let dir = &recipe.run.dir;
    let own = std::fs::canonicalize(dir.join("recipe.toml")).ok();
    if own.is_some() && own == std::fs::canonicalize(recipe_path).ok() {
        return Err(miette!(
            "run.dir: {} holds {} itself, which the resolved recipe would replace; expected another folder",
            dir.display(),
            recipe_path.display()
        ));
    }
    let mut unused = Unused::before(dir);
    let folder = RunFolder::create(dir).into_diagnostic()?;
    unused.armed = true;
    write_recipe(recipe, &folder)?;
    Ok((folder, unused))
}

/// What a new run has made so far; removed again unless it gets past its first step, so that a
/// mistake in the data or a device that is not there leaves nothing behind.
struct Unused {
    /// Whether to remove it. Not before the folder is this process's own, and not while training: a bug of
    /// ours must not take the results along.
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
        let files = RunFolder::FILES.map(|name| dir.join(name));
        Self {
            armed: false,
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
        Ending::Finished(Summary { steps, eval_before, best, skipped }) => {
            let mut text = format!("finished {steps} steps\n");
            if *skipped > 0 {
                text += &format!(
                    "skipped   {skipped} of them, as their loss or their gradients were no numbers\n"
                );
            }
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
