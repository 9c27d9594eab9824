use std::fs;
use std::path::Path;

use burn::tensor::Device;
use miette::{IntoDiagnostic, Result, miette};
use pronk_data::{CHAT_TEMPLATE as TEMPLATE_FILE, PromptTemplate};
use pronk_export::{
    Dtype, Finish, GgufMergeOptions, MODEL_GGUF, MergeOptions, MergeReport, measure, merge, merge_gguf,
};
use pronk_kernels::open_device;
use pronk_lora::{Adapter, loftq_config_of};
use pronk_model::{Base, GgufValue};
use pronk_train::{ModelCard, seal};

use crate::args::{self, Merge, MergeFormat};
use crate::base::OpenedBase;
use crate::model_card::{Making, with_training};
use crate::modelfile::Modelfile;
use crate::terminal::{end_on_signal, note, print, warn};
use crate::{base, gguf_keys, progress, proof};

/// `pronk merge`
pub fn run(args: &Merge) -> Result<()> {
    end_on_signal()?;
    let of_quantized = loftq_config_of(&args.adapter).into_diagnostic()?.is_some();
    if let (true, Some(onto)) = (of_quantized, &args.onto) {
        return Err(miette!(
            "--onto {onto}: {} brings back what the base lost when it was quantized (LoftQ, QERA), to weights that have it \
             still; leave --onto out",
            args.adapter.display()
        ));
    }
    let trained_on = base::open(&args.base, Path::new("."))?.of_adapter(&args.adapter)?;
    let other = args.onto.as_ref().map(|onto| base::open(onto, Path::new("."))?.of_adapter(&args.adapter));
    let other = other.transpose()?;
    let opened = other.as_ref().unwrap_or(&trained_on);
    if let (Some(formats), None, false) = (trained_on.base.quantization(), &other, of_quantized) {
        warn(&format!(
            "{} is quantized ({formats}): the merged model keeps what its weights were rounded to. To merge \
             into the weights as they were, name the base that it was made from with --onto",
            args.base
        ));
    }
    let device = open_device(&args.device.device).into_diagnostic()?;
    let modules = opened.base.config.adapter_modules();
    let adapter = Adapter::load(&args.adapter, &modules, &device).into_diagnostic()?;
    let prompt = proof::prompt(opened, &args.adapter)?;
    let bar = progress::bar("merging", 0);
    let mut progress = |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    };
    let merging = Merging { args, opened, adapter: &adapter, prompt: &prompt, device: &device };
    let report = match args.format {
        MergeFormat::Safetensors => merging.safetensors(&mut progress),
        MergeFormat::Gguf => merging.gguf(&mut progress),
    };
    bar.finish_and_clear();
    let MergeReport { files, tensors, adapted, bytes, verification } = report?;
    print(&format!(
        "merged {adapted} of {tensors} tensors into {} file(s), {:.2} GB: {}\n{}",
        files.len(),
        bytes as f64 / 1e9,
        args.out.display(),
        proof::shown(verification)
    ));
    if other.is_some() {
        let merged = match args.format {
            MergeFormat::Safetensors => Base::open(&args.out),
            MergeFormat::Gguf => Base::open(&args.out.join(MODEL_GGUF)),
        };
        let merged = merged.into_diagnostic()?;
        let found = measure(&trained_on.base, &adapter, &merged, &prompt, &device).into_diagnostic()?;
        print(&format!("against {} + adapter, which was trained: KL {:.2e} nats\n", args.base, found.kl));
    }
    Ok(())
}

/// What is merged, and how.
struct Merging<'a> {
    args: &'a Merge,
    /// What the adapter is merged into.
    opened: &'a OpenedBase,
    adapter: &'a Adapter,
    /// Tokens to compare on.
    prompt: &'a [u32],
    device: &'a Device,
}

impl Merging<'_> {
    /// A Hugging Face directory. A directory's tokenizer files are copied as they are; a GGUF file has none to copy. The
    /// adapter's template goes before the base's: it is what the merged model was trained with.
    fn safetensors(&self, progress: &mut dyn FnMut(usize, usize)) -> Result<MergeReport> {
        let Self { args, opened, adapter, prompt, device } = self;
        let dtype = args.dtype.map(|dtype| match dtype {
            args::Dtype::F32 => Dtype::F32,
            args::Dtype::F16 => Dtype::F16,
            args::Dtype::Bf16 => Dtype::Bf16,
        });
        let options = MergeOptions { dtype, prompt: prompt.to_vec(), ..MergeOptions::default() };
        let trained_with = PromptTemplate::of_adapter(&args.adapter, &opened.tokenizer).into_diagnostic()?;
        let card = Making::new(opened, adapter, trained_with.as_ref())?.of_merged(&args.adapter);
        let mut finish = |dir: &Path| {
            // What lies beside a Hugging Face base is copied already; it does not know tokens that were added.
            if opened.base.gguf().is_some() || !opened.tokenizer.added_tokens().is_empty() {
                opened.tokenizer.save(dir)?;
            }
            fs::write(dir.join(ModelCard::FILE), with_training(&card, &args.adapter))?;
            trained_with.iter().try_for_each(|template| template.save(dir))?;
            Ok(seal(dir)?)
        };
        merge(&opened.base, adapter, &args.out, &options, device, progress, &mut finish).into_diagnostic()
    }

    /// A GGUF file with a Modelfile beside it. The tokenizer is a GGUF base's own, or written as llama.cpp has it.
    fn gguf(&self, progress: &mut dyn FnMut(usize, usize)) -> Result<MergeReport> {
        let Self { args, opened, adapter, prompt, device } = self;
        let tokenizer = &opened.tokenizer;
        let vocab_size = opened.base.config.tuned_by(adapter).vocab_size;
        let mut metadata = match opened.base.gguf() {
            Some(file)
                if vocab_size > opened.base.config.vocab_size || !tokenizer.added_tokens().is_empty() =>
            {
                gguf_keys::keys(tokenizer.extend_gguf(gguf_keys::vocabulary(file), vocab_size))
            }
            Some(_) => Vec::new(),
            None => gguf_keys::keys(tokenizer.to_gguf(vocab_size).into_diagnostic()?),
        };
        let template = base::template(None, Some(&args.adapter), tokenizer)?;
        if template.file_name() == TEMPLATE_FILE {
            metadata.retain(|(key, _)| key != gguf_keys::CHAT_TEMPLATE);
            let source = GgufValue::String(template.source().to_owned());
            metadata.push((gguf_keys::CHAT_TEMPLATE.to_owned(), source));
        }
        let modelfile = Modelfile::new(format!("./{MODEL_GGUF}"), None, &template, tokenizer);
        if let Err(error) = &modelfile {
            note(&format!("without a Modelfile for Ollama: {error}"));
        }
        let making = Making::new(opened, adapter, Some(&template))?;
        let card = making.of_merged_gguf(&args.adapter, modelfile.is_ok());
        let mut finish = |dir: &Path| {
            fs::write(dir.join(ModelCard::FILE), with_training(&card, &args.adapter))?;
            if let Ok(modelfile) = &modelfile {
                fs::write(dir.join("Modelfile"), modelfile.to_string())?;
            }
            template.save(dir)?;
            Ok(seal(dir)?)
        };
        let finish: &mut Finish = &mut finish;
        let options = GgufMergeOptions { kind: args.gguf_type, metadata, prompt: prompt.to_vec() };
        merge_gguf(&opened.base, adapter, &args.out, &options, device, progress, finish).into_diagnostic()
    }
}
