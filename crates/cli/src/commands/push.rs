use std::path::Path;

use miette::{IntoDiagnostic, Result, miette};
use pronk_lora::base_of;
use pronk_train::{MANIFEST, ModelCard, RunFolder, verify};

use crate::args::Push;
use crate::terminal::{note, print};
use crate::upload::{Destination, FileToSend, Hub, MAIN, endpoint, files_in};

/// `pronk push`
pub fn run(args: &Push) -> Result<()> {
    let Push { dir, repo, revision, private, message, yes } = args;
    let to = Destination::new(repo, revision.as_deref().unwrap_or(MAIN), *private)?;
    must_be_whole(dir)?;
    let (mut files, folders) = files_in(dir)?;
    // Of this folder, which is not sent: the hub has hashes of its own.
    files.retain(|file| file.name != MANIFEST);
    if !folders.is_empty() {
        note(&format!("folders in it are not sent: {}", folders.join(", ")));
    }
    if let Ok(Some(base)) = base_of(dir)
        && Path::new(&base).is_absolute()
    {
        note(&format!(
            "the adapter names the base by a path of this machine, {base}; where the base is on the hub, put its \
             id into adapter_config.json and {}",
            ModelCard::FILE
        ));
    }
    print(&listed(&files, &to, *yes));
    if !yes {
        return Err(miette!("nothing was sent; the same command with --yes sends it"));
    }
    let summary = message.clone().unwrap_or_else(|| format!("Upload {} with pronk", name_of(dir)));
    let commit = Hub::from_env()?.send(&files, &to, &summary)?;
    print(&format!("sent: {commit}\n"));
    Ok(())
}

/// Refuses what `pronk verify` refuses, but for a card: that is its owner's to write on.
fn must_be_whole(dir: &Path) -> Result<()> {
    let run = RunFolder::look(dir);
    if run.recipe().exists() {
        let adapter = run.adapter();
        return Err(miette!(
            "{} is a run's folder; what others load is in {}",
            dir.display(),
            adapter.display()
        ));
    }
    let verified = verify(dir).into_diagnostic()?;
    let changed =
        verified.differences.iter().filter(|d| !d.path.ends_with(ModelCard::FILE) || !d.path.exists());
    let changed: Vec<String> = changed.map(|d| format!("{}: {}", d.path.display(), d.problem)).collect();
    if changed.is_empty() {
        return Ok(());
    }
    Err(miette!(
        "{} of the files are not what was written, and are not sent:\n  {}",
        changed.len(),
        changed.join("\n  ")
    ))
}

/// What goes where.
fn listed(files: &[FileToSend], to: &Destination, yes: bool) -> String {
    let total: u64 = files.iter().map(|file| file.bytes).sum();
    let lines: String = files.iter().map(|file| format!("{:>14}  {}\n", file.bytes, file.name)).collect();
    format!(
        "{} {} files, {total} bytes, to {}/{}, branch {}; {}\n{lines}",
        if yes { "sending" } else { "would send" },
        files.len(),
        endpoint(),
        to.repo,
        to.revision,
        if to.private { "private" } else { "public, if it is not there yet" },
    )
}

fn name_of(dir: &Path) -> String {
    dir.canonicalize()
        .ok()
        .and_then(|dir| Some(dir.file_name()?.to_string_lossy().into_owned()))
        .unwrap_or_default()
}
