use miette::{IntoDiagnostic, Result};
use pronk_model::{Shape, synthesize};

use crate::args::Synth;
use crate::progress;
use crate::terminal::{end_on_signal, print};

/// `pronk synth`
pub fn run(args: &Synth) -> Result<()> {
    let shape = Shape::named(&args.like).into_diagnostic()?;
    end_on_signal()?;
    let bar = progress::bar("writing megabytes", 0);
    let written = synthesize(&shape.config, &args.out, args.seed, args.quantize, |done, total| {
        bar.set_length(total / 1_000_000);
        bar.set_position(done / 1_000_000);
    });
    bar.finish_and_clear();
    let written = written.into_diagnostic()?;
    let (name, out) = (shape.name, args.out.display());
    print(&format!(
        "wrote {} tensors into {} file(s), {:.2} GB: {out}\n\
         a base as large as {name} that has learned nothing: with --base {out}, or base.path in a recipe, it shows \
         what {name} takes in memory and time\n",
        written.tensors,
        written.files.len(),
        written.bytes as f64 / 1e9,
    ));
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::CommandFactory;
    use pronk_model::SHAPES;

    use super::*;
    use crate::{args::Arguments, base};

    #[test]
    fn the_help_lists_every_shape() {
        let help = Arguments::command().find_subcommand_mut("synth").unwrap().render_help().to_string();
        for shape in SHAPES {
            assert!(help.contains(shape.name), "{} in {help}", shape.name);
        }
    }

    #[test]
    fn the_tokenizer_gives_every_text_back_and_fits_its_base() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("base");
        let mut config = Shape::named("smollm2-135m").unwrap().config.clone();
        (config.vocab_size, config.num_hidden_layers) = (259, 1);
        synthesize(&config, &out, 0, None, |_, _| {}).unwrap();
        let opened = base::open(out.to_str().unwrap(), Path::new(".")).unwrap();
        let tokenizer = &opened.tokenizer;
        assert_eq!((tokenizer.bos(), tokenizer.eos_ids()), (Some(1), [2].as_slice()));
        assert_eq!(tokenizer.vocab_size(), 259);
        opened.must_embed(tokenizer.vocab_size().checked_sub(1).map(|id| id as u32)).unwrap();
        for text in ["", "An alpaca hums.\n\n### Response:\n", "  señor\t東京 🦙\0\r\n  ", "<s>a</s>"] {
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(tokenizer.decode_with_specials(&ids).unwrap(), text);
            if !text.contains('<') {
                let bytes: Vec<u32> = text.bytes().map(|byte| u32::from(byte) + 3).collect();
                assert_eq!(ids, bytes, "{text:?}");
            }
        }
        assert_eq!(tokenizer.encode_prompt("<s>").unwrap(), [1, 1]);
        assert_eq!(tokenizer.encode("</s>").unwrap(), [2]);
    }
}
