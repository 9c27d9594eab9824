//! The files of a merged model beside its weights.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::Path;

use serde_json::{Value, json};

use crate::ExportError;

/// The one file of a checkpoint that needs no index.
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

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
    let mut source = File::open(from).map_err(ExportError::io(from))?;
    let mut target = File::create_new(to).map_err(ExportError::io(to))?;
    io::copy(&mut source, &mut target).map(drop).map_err(ExportError::io(to))
}

/// Writes which tensor is in which file, where there is more to know than one file's name.
pub fn write_index(
    dir: &Path,
    weight_map: &BTreeMap<String, String>,
    total_size: u64,
) -> Result<(), ExportError> {
    if weight_map.values().all(|file| file == SINGLE) {
        return Ok(());
    }
    let index = json!({"metadata": {"total_size": total_size}, "weight_map": weight_map});
    write_json(&dir.join(INDEX), &index)
}

/// Writes `value` as people read it.
pub fn write_json(path: &Path, value: &Value) -> Result<(), ExportError> {
    fs::write(path, format!("{value:#}\n")).map_err(ExportError::io(path))
}
