use std::fs;
use std::path::Path;

use miette::{IntoDiagnostic, Result};
use pronk_data::PromptTemplate;
use pronk_export::{ExportOptions, ExportReport, Runtime, export};
use pronk_kernels::open_device;
use pronk_lora::Adapter;
use pronk_train::{ModelCard, seal};

use crate::args::Export;
use crate::model_card::{Making, with_training};
use crate::modelfile::Modelfile;
use crate::terminal::{end_on_signal, note, print};
use crate::{base, proof};

/// `pronk export`
pub fn run(args: &Export) -> Result<()> {
    end_on_signal()?;
    let opened = base::open(&args.base, Path::new("."))?.of_adapter(&args.adapter)?;
    let device = open_device(&args.device.device).into_diagnostic()?;
    let modules = opened.base.config.adapter_modules();
    let adapter = Adapter::load(&args.adapter, &modules, &device).into_diagnostic()?;
    let options = ExportOptions {
        runtime: args.to,
        base_name: base::without_revision(&opened.lasting_name()).to_owned(),
        prompt: proof::prompt(&opened, &args.adapter)?,
    };
    let trained_with = PromptTemplate::of_adapter(&args.adapter, &opened.tokenizer).into_diagnostic()?;
    let modelfile = match args.to {
        Runtime::Ollama => {
            let template = base::template(None, Some(&args.adapter), &opened.tokenizer)?;
            let from = std::path::absolute(&opened.base.path).into_diagnostic()?.display().to_string();
            let modelfile = Modelfile::new(from, Some("adapter.gguf"), &template, &opened.tokenizer);
            Some(modelfile.into_diagnostic()?)
        }
        _ => None,
    };
    let card = Making::new(&opened, &adapter, trained_with.as_ref())?.of_export(args.to);
    let mut finish = |dir: &Path| {
        fs::write(dir.join(ModelCard::FILE), with_training(&card, &args.adapter))?;
        if let Some(modelfile) = &modelfile {
            fs::write(dir.join("Modelfile"), modelfile.to_string())?;
        }
        trained_with.iter().try_for_each(|template| template.save(dir))?;
        if !opened.tokenizer.added_tokens().is_empty() {
            opened.tokenizer.save(dir)?;
        }
        Ok(seal(dir)?)
    };
    let report = export(&opened.base, &adapter, &args.out, &options, &device, &mut finish);
    let ExportReport { files, adapted, notes, verification } = report.into_diagnostic()?;
    for message in notes {
        note(&message);
    }
    print(&format!(
        "exported {adapted} modules for {}: {} in {}\n{}{}\n",
        args.to,
        files.join(" and "),
        args.out.display(),
        proof::shown(verification),
        usage(args.to, &args.base, &args.out.display().to_string())
    ));
    Ok(())
}

/// The command that loads it.
fn usage(runtime: Runtime, base: &str, out: &str) -> String {
    match runtime {
        Runtime::Peft => format!("PeftModel.from_pretrained(model, \"{out}\")"),
        Runtime::Gguf => format!("llama-cli --model BASE.gguf --lora {out}/adapter.gguf"),
        Runtime::Mlx => format!("mlx_lm.generate --model {base} --adapter-path {out} --prompt \"..\""),
        Runtime::Ollama => format!("ollama create NAME --file {out}/Modelfile"),
        Runtime::Vllm => format!("vllm serve {base} --enable-lora --lora-modules NAME={out}"),
        Runtime::MistralRs => {
            format!("mistralrs.Which.Lora(\"{base}\", adapters=[mistralrs.LoraAdapter(\"NAME\", \"{out}\")])")
        }
    }
}
