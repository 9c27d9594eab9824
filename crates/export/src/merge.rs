use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

use burn::tensor::Device;
use pronk_lora::Adapter;
use pronk_model::Base;

use crate::config_json::{CONFIG, config_json};
use crate::directory::{copy_companions, write_index, write_json};
use crate::shard::{self, Entry};
use crate::staging::Staging;
use crate::update::Update;
use crate::{Dtype, ExportError, Verification, verify};

/// How to write a merged model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MergeOptions {
    /// The format of every tensor; `None` keeps each tensor's own. A GGUF base has none that a
    /// merged weight could keep: its tensors become float32 then, which holds them exactly.
    pub dtype: Option<Dtype>,
    /// About how large the files are that a GGUF base is split into. A directory keeps its own.
    pub shard_bytes: usize,
    /// Tokens to compare the merged model with base and adapter on: a prompt of the kind that
    /// the adapter was trained on shows more than any other.
    pub prompt: Vec<u32>,
}

impl Default for MergeOptions {
    /// The base's own formats, and 5 GB a file, as transformers splits them. The prompt is
    /// empty and has to be given.
    fn default() -> Self {
        Self { dtype: None, shard_bytes: 5_000_000_000, prompt: Vec::new() }
    }
}

/// What a merge has written.
#[derive(Debug, Clone, PartialEq)]
pub struct MergeReport {
    /// The weight files, in order.
    pub files: Vec<String>,
    /// How many tensors are in them.
    pub tensors: usize,
    /// How many of those the adapter has changed.
    pub adapted: usize,
    /// Bytes that their numbers take.
    pub bytes: u64,
    /// How closely the merged model answers as base and adapter do.
    pub verification: Verification,
}

/// Adds the caller's own files to the directory it is given, before the merged model is
/// verified and moved into place.
pub type Finish<'a> = dyn FnMut(&Path) -> Result<(), Box<dyn Error + Send + Sync>> + 'a;

/// Writes `base` with `adapter` in its weights to the directory `out`, which must not exist or
/// be empty: the base's own file names, tensor names and, unless `options` say otherwise,
/// formats; its configuration, tokenizer, templates and licence.
///
/// `W + scale * B A` is computed in float32, one tensor at a time, and rounded once; tensors
/// without an adapter keep their bytes. `progress` hears how many tensors are written and how
/// many there will be. `finish` may add files (for a GGUF base, the tokenizer). The merged
/// model is then read back and verified on `device`, where the adapter must lie, and only then
/// renamed to `out`. Whatever fails before leaves nothing behind.
pub fn merge(
    base: &Base,
    adapter: &Adapter,
    out: &Path,
    options: &MergeOptions,
    device: &Device,
    progress: &mut dyn FnMut(usize, usize),
    finish: &mut Finish,
) -> Result<MergeReport, ExportError> {
    let update = Update::new(base, adapter, options.dtype)?;
    verify::check_prompt(base, &options.prompt)?;
    let staging = Staging::beside(out, &base.path)?;
    let dir = staging.path();
    let (weight_map, bytes) = write_weights(base, &update, dir, options, progress)?;
    write_index(dir, &weight_map, bytes)?;
    write_json(&dir.join(CONFIG), &config_json(base, options.dtype)?)?;
    if base.gguf().is_none() {
        copy_companions(&base.path, dir)?;
    }
    finish(dir).map_err(ExportError::Finish)?;
    let verification = verify::verify(base, adapter, dir, &options.prompt, device)?;
    staging.publish()?;
    let mut files: Vec<String> = weight_map.values().cloned().collect();
    files.sort();
    files.dedup();
    Ok(MergeReport { files, tensors: weight_map.len(), adapted: update.len(), bytes, verification })
}

/// Writes every shard; returns each tensor's file, and the bytes of all numbers.
fn write_weights(
    base: &Base,
    update: &Update,
    dir: &Path,
    options: &MergeOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(BTreeMap<String, String>, u64), ExportError> {
    let mut shapes = base.shapes();
    let (mut done, total) = (0, shapes.len());
    let (mut weight_map, mut bytes) = (BTreeMap::new(), 0);
    progress(done, total);
    for shard in base.shards(options.shard_bytes, options.dtype.unwrap_or(Dtype::F32).bytes()) {
        let mut entries = Vec::with_capacity(shard.tensors.len());
        for name in shard.tensors {
            let (dtype, shape) = (update.dtype(&name)?, shapes.remove(&name).unwrap_or_default());
            weight_map.insert(name.clone(), shard.file.clone());
            entries.push(Entry { name, dtype, shape });
        }
        bytes += shard::write(&dir.join(&shard.file), entries, |name| {
            let tensor = update.apply(name)?;
            done += 1;
            progress(done, total);
            Ok(tensor)
        })?;
    }
    Ok((weight_map, bytes))
}
