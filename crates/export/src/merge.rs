use std::collections::BTreeSet;
use std::error::Error;
use std::path::Path;

use burn::tensor::Device;
use pronk_lora::Adapter;
use pronk_model::{Base, Shard, ShardSpec, Staging, TensorSpec, WeightsWriter, WrittenWeights};

use crate::config_json::{CONFIG, config_json};
use crate::directory::copy_companions;
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
    verify::check_prompt(update.config(), &options.prompt)?;
    let staging = Staging::beside(out, Some(&base.path))?;
    let dir = staging.path();
    let shards = plan(base, &update, options)?;
    let WrittenWeights { files, tensors, bytes } = write_weights(&update, shards, &staging, progress)?;
    staging
        .add_file(CONFIG, format!("{:#}\n", config_json(base, update.config(), options.dtype)?).as_bytes())?;
    if base.gguf().is_none() {
        copy_companions(&base.path, dir)?;
    }
    finish(dir).map_err(ExportError::Finish)?;
    let verification = verify::verify(base, adapter, update.config(), dir, &options.prompt, device)?;
    staging.publish()?;
    Ok(MergeReport { files, tensors, adapted: update.len(), bytes, verification })
}

/// The base's files, with the formats that their tensors will have.
fn plan(base: &Base, update: &Update, options: &MergeOptions) -> Result<Vec<ShardSpec>, ExportError> {
    let mut shapes = update.shapes();
    let mut shards = base.shards(options.shard_bytes, options.dtype.unwrap_or(Dtype::F32).bytes());
    let held: BTreeSet<&String> = shards.iter().flat_map(|shard| &shard.tensors).collect();
    let new: Vec<String> = shapes.keys().filter(|name| !held.contains(name)).cloned().collect();
    if let Some(last) = shards.last_mut() {
        last.tensors.extend(new);
    }
    let spec = |shard: Shard| {
        let mut tensors = Vec::with_capacity(shard.tensors.len());
        for name in shard.tensors {
            let (dtype, shape) = (update.dtype(&name)?.in_file(), shapes.remove(&name).unwrap_or_default());
            tensors.push(TensorSpec { name, dtype, shape });
        }
        // As safetensors orders them: the widest format first, so that all numbers lie aligned.
        tensors.sort_by(|x, y| (y.dtype.bitsize(), &x.name).cmp(&(x.dtype.bitsize(), &y.name)));
        Ok(ShardSpec { file: shard.file, tensors })
    };
    shards.into_iter().map(spec).collect()
}

/// Computes one tensor after another while it is written.
fn write_weights(
    update: &Update,
    shards: Vec<ShardSpec>,
    staging: &Staging,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<WrittenWeights, ExportError> {
    let tensors: Vec<TensorSpec> = shards.iter().flat_map(|shard| shard.tensors.clone()).collect();
    let mut writer = WeightsWriter::new(staging, shards);
    progress(0, tensors.len());
    for (done, spec) in (1..).zip(&tensors) {
        let tensor = update.apply(&spec.name)?;
        if (tensor.dtype, &tensor.shape) != (spec.dtype, &spec.shape) {
            let problem = format!("{}: the tensor is not as its file's header says", spec.name);
            return Err(ExportError::Malformed { path: staging.destination().into(), problem });
        }
        writer.write(&spec.name, &tensor.bytes)?;
        progress(done, tensors.len());
    }
    Ok(writer.finish()?)
}
