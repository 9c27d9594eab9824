use std::path::Path;

use miette::{IntoDiagnostic, Result};
use pronk_data::PromptTemplate;
use pronk_export::{Dtype, MergeOptions, MergeReport, merge};
use pronk_kernels::open_device;
use pronk_lora::Adapter;

use crate::args::{self, Merge};
use crate::terminal::print;
use crate::{base, progress, proof};

/// `pronk merge`
pub fn run(args: &Merge) -> Result<()> {
    let opened = base::open(&args.base, Path::new("."))?;
    if let Some(formats) = opened.base.quantization() {
        eprintln!(
            "note: {} is quantized ({formats}): the merged model keeps what its weights were rounded to. To merge \
             into the weights as they were, give the base that it was made from",
            args.base
        );
    }
    let device = open_device(&args.device.device).into_diagnostic()?;
    let modules = opened.base.config.adapter_modules();
    let adapter = Adapter::load(&args.adapter, &modules, &device).into_diagnostic()?;
    let prompt = proof::prompt(&opened, &args.adapter)?;

    let dtype = args.dtype.map(|dtype| match dtype {
        args::Dtype::F32 => Dtype::F32,
        args::Dtype::F16 => Dtype::F16,
        args::Dtype::Bf16 => Dtype::Bf16,
    });
    let options = MergeOptions { dtype, prompt, ..MergeOptions::default() };
    let bar = progress::bar("merging", 0);
    let mut progress = |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    };
    // A directory's tokenizer files are copied as they are; a GGUF file has none to copy. The adapter's template goes
    // before the base's: it is what the merged model was trained with.
    let trained_with = PromptTemplate::of_adapter(&args.adapter, &opened.tokenizer).into_diagnostic()?;
    let mut finish = |dir: &Path| {
        if opened.base.gguf().is_some() {
            opened.tokenizer.save(dir)?;
        }
        Ok(trained_with.iter().try_for_each(|template| template.save(dir))?)
    };
    let report = merge(&opened.base, &adapter, &args.out, &options, &device, &mut progress, &mut finish);
    bar.finish_and_clear();
    let MergeReport { files, tensors, adapted, bytes, verification } = report.into_diagnostic()?;
    print(&format!(
        "merged {adapted} of {tensors} tensors into {} file(s), {:.2} GB: {}\n\
         {}",
        files.len(),
        bytes as f64 / 1e9,
        args.out.display(),
        proof::shown(verification)
    ));
    Ok(())
}
