mod batch;

use std::ops::ControlFlow;
use std::process::ExitCode;

use miette::Result;
use pronk_model::KeyValueCache;

use crate::args::Generate;
use crate::speaker::{self, Voices};
use crate::terminal::print;

/// `pronk generate`
pub fn run(args: &Generate) -> Result<ExitCode> {
    let sampling = speaker::sampling(&args.speaking)?;
    let voices = Voices::open(&args.speaking)?;
    let device = &args.speaking.device.device;
    if let (Some(batch), Some(out)) = (&args.batch, &args.out) {
        return batch::run(voices, device, sampling, batch, out);
    }
    let question = speaker::question(args.instruction.as_deref().unwrap_or_default(), &args.input);
    let prompts = (0..voices.all().len()).map(|voice| voices.prompt(voice, &question));
    let prompts = prompts.collect::<Result<Vec<_>>>()?;
    let speaker = voices.load(device)?;
    for (voice, prompt) in prompts.iter().enumerate() {
        if let (Some(named), true) = (speaker.voices().all().get(voice), prompts.len() > 1) {
            print(&format!("## {}\n", named.name));
        }
        speaker.answer(&mut KeyValueCache::default(), voice, prompt, sampling, |text| {
            print(text);
            ControlFlow::Continue(())
        })?;
        print("\n");
    }
    Ok(ExitCode::SUCCESS)
}
