//! A merged model as one GGUF file.

use std::path::Path;

use burn::tensor::Device;
use pronk_kernels::Format;
use pronk_lora::Adapter;
use pronk_model::{Base, DecoderConfig, GgufTensor, GgufValue, GgufWriter, Staging};

use crate::update::Update;
use crate::{Dtype, ExportError, Finish, GgufType, MergeReport, verify};

/// The merged model, in its directory.
pub const MODEL_GGUF: &str = "model.gguf";

/// Llama 3's factors of the rotary frequencies.
const ROPE_FREQS: &str = "rope_freqs.weight";

/// How to write a merged GGUF file.
#[derive(Debug, Clone)]
pub struct GgufMergeOptions {
    /// What matrices are kept in; `None` is the base's own dtype, and float32 for what was quantized.
    pub kind: Option<GgufType>,
    /// Keys to add, those of the tokenizer above all. They go before the keys of a GGUF base, which are all kept.
    pub metadata: Vec<(String, GgufValue)>,
    /// Tokens to compare the merged model with base and adapter on.
    pub prompt: Vec<u32>,
}

/// Writes `base` with `adapter` in its weights as [`MODEL_GGUF`] into the directory `out`, which must not exist or be
/// empty: llama.cpp's names, order of rows and norms, one tensor at a time.
///
/// `progress` and `finish` are as for [`merge`](crate::merge()), and so is the verification.
pub fn merge_gguf(
    base: &Base,
    adapter: &Adapter,
    out: &Path,
    options: &GgufMergeOptions,
    device: &Device,
    progress: &mut dyn FnMut(usize, usize),
    finish: &mut Finish,
) -> Result<MergeReport, ExportError> {
    let update = Update::new(base, adapter, Some(Dtype::F32))?;
    verify::check_prompt(update.config(), &options.prompt)?;
    let kind = options.kind.unwrap_or(Dtype::of_file(base.dtype()).into());
    let metadata = metadata(base, update.config(), kind, &options.metadata)?;
    let staging = Staging::beside(out, Some(&base.path))?;
    let tensors = plan(&update, kind)?;
    let bytes = write(base, &update, &staging, &metadata, &tensors, progress)?;
    finish(staging.path()).map_err(ExportError::Finish)?;
    let merged = staging.path().join(MODEL_GGUF);
    let verification =
        verify::verify_gguf(base, adapter, update.config(), &merged, kind, &options.prompt, device)?;
    staging.publish()?;
    let files = vec![MODEL_GGUF.to_owned()];
    Ok(MergeReport { files, tensors: tensors.len(), adapted: update.len(), bytes, verification })
}

/// All keys of the file: a GGUF base's own, or those of the configuration.
fn metadata(
    base: &Base,
    merged: &DecoderConfig,
    kind: GgufType,
    more: &[(String, GgufValue)],
) -> Result<Vec<(String, GgufValue)>, ExportError> {
    let own = |key: &str, value| (key.to_owned(), value);
    let mut ours = vec![
        own("general.type", GgufValue::String("model".into())),
        own("general.file_type", GgufValue::U32(kind.file_type())),
    ];
    if kind.is_quantized() {
        ours.push(own("general.quantization_version", GgufValue::U32(2)));
    }
    ours.extend_from_slice(more);
    let mut keys = match base.gguf() {
        Some(file) => {
            let mut keys = file.metadata();
            for (_, value) in keys.iter_mut().filter(|(key, _)| key.ends_with(".vocab_size")) {
                *value = GgufValue::U32(merged.vocab_size as u32);
            }
            keys
        }
        None => {
            merged.to_gguf().map_err(|problems| ExportError::NoGguf { base: base.path.clone(), problems })?
        }
    };
    // What tells how the base's own numbers were kept is not so any more.
    let of_the_base = ["general.quantization_version", "general.alignment", "quantize.", "split."];
    keys.retain(|(key, _)| {
        !ours.iter().any(|(name, _)| name == key) && !of_the_base.iter().any(|begin| key.starts_with(begin))
    });
    // llama.cpp wants the architecture in front of what it looks for under its name.
    keys.sort_by_key(|(key, _)| key != "general.architecture");
    keys.extend(ours);
    Ok(keys)
}

/// Every tensor of the model, by the name that the file has for it.
fn plan(update: &Update, kind: GgufType) -> Result<Vec<(String, GgufTensor)>, ExportError> {
    let config = update.config();
    let head = config.head_weight();
    let place = |(name, shape): (String, Vec<usize>)| {
        let gguf = config.gguf_name(&name).ok_or_else(|| ExportError::NoGguf {
            base: update.base().path.clone(),
            problems: vec![format!("{name}: llama.cpp has no such tensor")],
        })?;
        let format = match shape[..] {
            [_, columns] => kind.format(columns, name == head),
            _ => Format::F32,
        };
        Ok((name, GgufTensor { name: gguf, shape, format }))
    };
    config.tensors().into_iter().map(place).collect()
}

fn write(
    base: &Base,
    update: &Update,
    staging: &Staging,
    metadata: &[(String, GgufValue)],
    tensors: &[(String, GgufTensor)],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<u64, ExportError> {
    let factors = base.config.rope_freqs();
    let factors_tensor = factors.as_ref().map(|factors| GgufTensor {
        name: ROPE_FREQS.to_owned(),
        shape: vec![factors.len()],
        format: Format::F32,
    });
    let all = factors_tensor.into_iter().chain(tensors.iter().map(|(_, tensor)| tensor.clone())).collect();
    let mut writer = GgufWriter::create(staging, MODEL_GGUF, metadata, all)?;
    if let Some(factors) = factors {
        writer.write(ROPE_FREQS, &factors)?;
    }
    progress(0, tensors.len());
    for (done, (name, tensor)) in (1..).zip(tensors) {
        let values = update.apply(name)?.to_f32();
        if tensor.format == Format::F16
            && let Some(&found) = values.iter().find(|x| !Dtype::F16.holds(**x))
        {
            let remedy = "choose --gguf-type bf16 or f32";
            return Err(ExportError::Number { tensor: name.clone(), dtype: "float16", found, remedy });
        }
        let rows = tensor.shape.first().copied().unwrap_or(0);
        writer.write(&tensor.name, &base.config.values_to_gguf(name, rows, values))?;
        progress(done, tensors.len());
    }
    Ok(writer.finish()?)
}
