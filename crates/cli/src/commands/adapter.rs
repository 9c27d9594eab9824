use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use miette::{IntoDiagnostic, Result, WrapErr, miette};
use pronk_data::{CHAT_TEMPLATE, PROMPT_TEMPLATE};
use pronk_export::Extraction;
use pronk_kernels::open_device;
use pronk_lora::{
    Adapter, AllLinear, Combination, EMBED_TOKENS, LoraConfig, ModuleSummary, TargetModules, TensorKind,
    base_of,
};
use pronk_model::Staging;
use pronk_train::{ModelCard, seal};

use crate::args::{Combine, Extract, Method};
use crate::model_card::{Making, of_combined};
use crate::terminal::{end_on_signal, note, print};
use crate::{base, progress};

/// `pronk adapter info`
pub fn info(dir: &Path) -> Result<()> {
    let adapter = load(dir)?;
    let modules = adapter.summary().into_diagnostic()?;
    let base = base_of(dir).into_diagnostic()?;
    print(&describe(&adapter, &modules, base.as_deref()));
    Ok(())
}

fn load(dir: &Path) -> Result<Adapter> {
    Adapter::load_alone(dir, &open_device("cpu").into_diagnostic()?).into_diagnostic()
}

/// A table with a line for every kind of module, and what is wrong.
fn describe(adapter: &Adapter, modules: &[ModuleSummary], base: Option<&str>) -> String {
    let config = &adapter.config;
    let mut kinds: BTreeMap<&str, Vec<&ModuleSummary>> = BTreeMap::new();
    for module in modules {
        kinds.entry(module.name.rsplit('.').next().unwrap_or(&module.name)).or_default().push(module);
    }
    let kind = if config.use_dora { "DoRA" } else { "LoRA" };
    let parameters = adapter.parameters();
    let mut text = format!(
        "{kind}, {parameters} parameters in {} modules of {}{}\nrank {}, alpha {}, dropout {}{}\n\n\
         {:<14} {:>7} {:>6} {:>10} {:>12} {:>10} {:>10}\n",
        modules.len(),
        base.unwrap_or("a base that it does not name"),
        config
            .loftq_config
            .as_ref()
            .map_or(String::new(), |it| format!(" quantized to {} bits", it.loftq_bits)),
        config.rank,
        config.alpha,
        config.dropout,
        if config.rslora { ", scaled by alpha / sqrt(rank)" } else { "" },
        "module",
        "layers",
        "rank",
        "scale",
        "parameters",
        "mean norm",
        "largest",
    );
    for (kind, modules) in kinds {
        let norms = || modules.iter().map(|module| module.norm);
        text += &format!(
            "{kind:<14} {:>7} {:>6} {:>10} {:>12} {:>10.4} {:>10.4}\n",
            modules.len(),
            range(modules.iter().map(|module| module.rank as f64)),
            range(modules.iter().map(|module| module.scale)),
            modules.iter().map(|module| module.parameters).sum::<usize>(),
            norms().sum::<f64>() / modules.len() as f64,
            norms().fold(0.0, f64::max),
        );
    }
    text += "\nnorms are those of scale * B A\n";
    text + &trained_whole(adapter) + &warnings(modules)
}

/// A line for every weight that takes the place of the base's, and one for all biases.
fn trained_whole(adapter: &Adapter) -> String {
    let mut text = String::new();
    let (mut biases, mut numbers) = (0, 0);
    for (name, tensor) in &adapter.whole {
        let [rows, columns] = tensor.dims();
        if name.kind == TensorKind::Bias {
            (biases, numbers) = (biases + 1, numbers + columns);
            continue;
        }
        let tied = adapter.config.ensure_weight_tying && name.module == EMBED_TOKENS;
        let tied = if tied { ", the head's too (ensure_weight_tying)" } else { "" };
        text += &format!("trained whole: {name}, {rows} tokens of {columns}{tied}\n");
    }
    if biases > 0 {
        text += &format!("trained whole: {biases} biases, {numbers} numbers\n");
    }
    text
}

/// One number, or the lowest and the highest.
fn range(values: impl Iterator<Item = f64>) -> String {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.dedup();
    let short = |value: &f64| format!("{}", (value * 1e4).round() / 1e4);
    match (values.first(), values.last()) {
        (Some(low), Some(high)) if values.len() > 1 => format!("{}-{}", short(low), short(high)),
        (Some(only), _) => short(only),
        _ => String::new(),
    }
}

fn warnings(modules: &[ModuleSummary]) -> String {
    let named = |modules: Vec<&ModuleSummary>, what: &str| match modules.first() {
        Some(first) => format!("warning: {} module(s) {what}, such as {}\n", modules.len(), first.name),
        None => String::new(),
    };
    let broken = modules.iter().filter(|module| !module.finite).collect();
    let idle = modules.iter().filter(|module| module.finite && module.norm == 0.0).collect();
    named(broken, "hold numbers that are not finite") + &named(idle, "change nothing: A or B is zero")
}

/// `pronk adapter combine`
pub fn combine(args: &Combine) -> Result<()> {
    let (dirs, weights) = (&args.adapter, &args.weight);
    if dirs.len() != weights.len() {
        let (given, weights) = (dirs.len(), weights.len());
        return Err(miette!("--weight: expected one for each --adapter, found {weights} for {given}"));
    }
    end_on_signal()?;
    let staging = Staging::beside(&args.out, None).into_diagnostic()?;
    let adapters = dirs.iter().map(|dir| load(dir)).collect::<Result<Vec<_>>>()?;
    let bases = dirs.iter().map(|dir| base_of(dir).into_diagnostic()).collect::<Result<Vec<_>>>()?;
    let base = bases.first().cloned().flatten().unwrap_or_default();
    for (dir, other) in dirs.iter().zip(&bases) {
        if other.as_deref() != Some(base.as_str()) {
            let other = other.as_deref().unwrap_or("none");
            note(&format!("{} belongs to the base {other}, the first one to {base}", dir.display()));
        }
    }
    let weighted: Vec<(&Adapter, f64)> = adapters.iter().zip(weights.iter().copied()).collect();
    let how = match args.method {
        Method::Cat => Combination::Cat,
        Method::Linear => Combination::Linear,
    };
    let combined = Adapter::combine(&weighted, how).into_diagnostic()?;
    let parts: Vec<(String, f64)> =
        dirs.iter().map(|dir| dir.display().to_string()).zip(weights.iter().copied()).collect();
    let mut beside = common_templates(dirs)?;
    beside.push((ModelCard::FILE, of_combined(&combined, &base, &parts, args.method)));
    publish(staging, &combined, &base, &beside)?;
    let modules = combined.summary().into_diagnostic()?;
    print(&describe(&combined, &modules, Some(&base)));
    Ok(())
}

/// `pronk adapter extract`
pub fn extract(args: &Extract) -> Result<()> {
    end_on_signal()?;
    let staging = Staging::beside(&args.out, None).into_diagnostic()?;
    let [base, tuned] = [&args.base, &args.tuned].map(|name| base::open(name, Path::new(".")));
    let (base, tuned) = (base?, tuned?);
    let target_modules = if args.target_modules.is_empty() {
        TargetModules::Word(AllLinear::AllLinear)
    } else {
        TargetModules::Names(args.target_modules.clone())
    };
    // Alpha at the rank is a scale of one.
    let config =
        LoraConfig { rank: args.rank, alpha: args.rank as f64, target_modules, ..LoraConfig::default() };
    config.validate().into_diagnostic()?;
    let device = open_device("cpu").into_diagnostic()?;
    let bar = progress::bar("extracting", 0);
    let progress = |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    };
    let extraction = pronk_export::extract(&base.base, &tuned.base, &config, args.seed, &device, progress);
    bar.finish_and_clear();
    let extraction = extraction.into_diagnostic()?;
    let kept = kept(&extraction);
    let card = Making::new(&base, &extraction.adapter, None)?.of_adapter();
    let of = Path::new(&args.tuned).file_name().unwrap_or_default().to_string_lossy();
    let training = ModelCard::TRAINING;
    let card =
        format!("{card}{training}\nNone: taken out of `{of}` by pronk adapter extract.\n\n```\n{kept}```\n");
    publish(staging, &extraction.adapter, &base.name, &[(ModelCard::FILE, card)])?;
    print(&kept);
    Ok(())
}

/// How much of the difference the adapter holds, by kind of layer.
fn kept(extraction: &Extraction) -> String {
    let mut kinds: BTreeMap<&str, [f64; 2]> = BTreeMap::new();
    for layer in &extraction.layers {
        let [kept, energy] = kinds.entry(layer.name.rsplit('.').next().unwrap_or_default()).or_default();
        (*kept, *energy) = (*kept + layer.kept, *energy + layer.energy);
    }
    let mut text = format!("kept {:.1} % of the difference's energy in\n", 100.0 * extraction.kept());
    for (kind, [kept, energy]) in kinds {
        text += &format!("{kind:<14} {:>6.1} %\n", 100.0 * kept / energy);
    }
    if let Some(first) = extraction.left_out.first() {
        let count = extraction.left_out.len();
        text += &format!("warning: {count} tensor(s) differ and are left out, such as {first}\n");
    }
    text
}

/// Writes an adapter and the text of other files beside it: all, or nothing.
fn publish(staging: Staging, adapter: &Adapter, base: &str, others: &[(&str, String)]) -> Result<()> {
    let files = adapter.files(staging.destination(), base, false).into_diagnostic()?;
    files.write(staging.path()).into_diagnostic()?;
    for (name, text) in others {
        staging.add_file(name, text.as_bytes()).into_diagnostic()?;
    }
    seal(staging.path()).into_diagnostic()?;
    staging.publish().into_diagnostic()
}

/// The template of all goes along; of different ones none would be right.
fn common_templates(dirs: &[PathBuf]) -> Result<Vec<(&'static str, String)>> {
    let mut common = Vec::new();
    for name in [CHAT_TEMPLATE, PROMPT_TEMPLATE] {
        let paths = dirs.iter().map(|dir| dir.join(name));
        let sources = paths.map(|path| text_where_there_is_one(&path)).collect::<Result<Vec<_>>>()?;
        match sources.first() {
            Some(Some(first)) if sources.iter().all(|source| source.as_ref() == Some(first)) => {
                common.push((name, first.clone()));
            }
            _ if sources.iter().any(Option::is_some) => {
                note(&format!("the adapters have templates of their own ({name}); none goes along"));
            }
            _ => {}
        }
    }
    Ok(common)
}

fn text_where_there_is_one(path: &Path) -> Result<Option<String>> {
    match pronk_files::read_text(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).into_diagnostic().wrap_err_with(|| path.display().to_string()),
    }
}
