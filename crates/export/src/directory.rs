//! The files of a merged model beside its weights.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use crate::ExportError;

/// What goes with a base: its tokenizer, its templates, its way to generate.
const COMPANIONS: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
];

/// Its terms, which go wherever the weights go.
const TERMS: [&str; 3] = ["LICENSE", "LICENCE", "NOTICE"];

/// Copies the small files of the base directory `from` that belong to a merged model.
pub fn copy_companions(from: &Path, to: &Path) -> Result<(), ExportError> {
    for entry in fs::read_dir(from).map_err(ExportError::io(from))? {
        let path = entry.map_err(ExportError::io(from))?.path();
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
        let wanted = COMPANIONS.contains(&name) || TERMS.iter().any(|terms| name.starts_with(terms));
        if wanted && path.is_file() {
            copy(&path, &to.join(name))?;
        }
    }
    Ok(())
}

/// The contents alone: a base may be kept read-only, what is made of it need not be.
fn copy(from: &Path, to: &Path) -> Result<(), ExportError> {
    let mut source = pronk_files::open(from).map_err(ExportError::io(from))?;
    let mut target = File::create_new(to).map_err(ExportError::io(to))?;
    io::copy(&mut source, &mut target).map(drop).map_err(ExportError::io(to))
}
