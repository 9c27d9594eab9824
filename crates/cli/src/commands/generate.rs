use std::ops::ControlFlow;
use std::path::Path;

use miette::{IntoDiagnostic, Result, miette};
use pronk_data::{Conversation, tokenize_prompt};
use pronk_lora::ForwardMode;
use pronk_model::{LoadConfig, Sampling, generate};

use crate::args::Generate;
use crate::base;
use crate::terminal::print;

/// `pronk generate`
pub fn run(args: &Generate) -> Result<()> {
    let sampling = sampling(args)?;
    let opened = base::open(&args.base, Path::new("."))?;
    let tokenizer = &opened.tokenizer;
    let template = base::template(args.template.as_deref(), args.adapter.as_deref(), tokenizer)?;
    let question = Conversation::question(&args.instruction, &args.input);
    let prompt = tokenize_prompt(tokenizer, &question, &template).into_diagnostic()?;
    opened.must_embed(prompt.iter().max().copied())?;
    let context = opened.base.config.max_position_embeddings;
    if prompt.len() >= context {
        return Err(miette!("the prompt has {} tokens, the base's context is {context}", prompt.len()));
    }
    let decoder = opened.load(&args.device.device, LoadConfig::default())?;
    let adapter = args.adapter.as_ref().map(|dir| opened.load_adapter(dir, &decoder)).transpose()?;

    let mut text = tokenizer.decode_stream();
    let mut failure = None;
    let on_token = |token| match text.step(token) {
        Ok(piece) => {
            print(&piece);
            ControlFlow::Continue(())
        }
        Err(e) => {
            failure = Some(e);
            ControlFlow::Break(())
        }
    };
    let mode = ForwardMode::inference(adapter.as_ref());
    generate(&decoder, mode, &prompt, tokenizer.eos_ids(), sampling, on_token).into_diagnostic()?;
    if let Some(e) = failure {
        return Err(e).into_diagnostic();
    }
    print(&text.finish().into_diagnostic()?);
    print("\n");
    Ok(())
}

fn sampling(args: &Generate) -> Result<Sampling> {
    let &Generate { max_new_tokens, temperature, top_p, seed, .. } = args;
    if !temperature.is_finite() || temperature < 0.0 {
        return Err(miette!("--temperature: expected a number from 0, found {temperature}"));
    }
    if !(top_p > 0.0 && top_p <= 1.0) {
        return Err(miette!("--top-p: expected a number above 0, up to 1, found {top_p}"));
    }
    Ok(Sampling { max_new_tokens, temperature, top_p, seed })
}
