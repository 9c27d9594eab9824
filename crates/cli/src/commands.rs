//! One file a command.

mod adapter;
mod bench;
mod chat;
mod devices;
mod export;
mod generate;
mod inspect;
mod inspect_run;
mod merge;
mod plan;
pub mod prep;
mod push;
mod synth;
mod train;
mod verify;

use std::process::ExitCode;

use miette::Result;

use crate::args::{AdapterCommand, Arguments, Command, What};

/// Runs what the command line asks for.
pub fn run(arguments: Arguments) -> Result<ExitCode> {
    match arguments.command {
        Command::Prep(args) => prep::run(args),
        Command::Train(args) => return train::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Bench(args) => return bench::run(&args),
        Command::Merge(args) => merge::run(&args),
        Command::Adapter(args) => match args.what {
            AdapterCommand::Info { dir } => adapter::info(&dir),
            AdapterCommand::Combine(args) => adapter::combine(&args),
            AdapterCommand::Extract(args) => adapter::extract(&args),
        },
        Command::Export(args) => export::run(&args),
        Command::Generate(args) => return generate::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Inspect(args) => match args.what {
            What::Data { file, row: Some(row), base, .. } => inspect::row(&file, row, base.as_deref()),
            What::Data { file, base, allow, .. } => inspect::data(&file, base.as_deref(), &allow),
            What::Run { dir } => inspect_run::run(&dir),
            What::Logits { base, adapter, text, out, device } => {
                inspect::logits(&base, adapter.as_deref(), &text, &out, &device.device)
            }
        },
        Command::Verify(args) => return verify::run(&args),
        Command::Push(args) => push::run(&args),
        Command::Synth(args) => synth::run(&args),
        Command::Devices => {
            devices::run();
            Ok(())
        }
    }?;
    Ok(ExitCode::SUCCESS)
}
