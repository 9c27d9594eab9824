//! `pronk`: cheap instruction tuning, from an instruction JSON to an adapter and a merged model.
//!
//! Exit codes: 0 for success, 1 for the user's mistake, 2 for ours.

// A terminal that was closed ends those with a panic; `terminal` has others.
#![warn(clippy::print_stderr, clippy::print_stdout)]

mod args;
mod base;
mod cards;
mod commands;
mod datasets;
mod gguf_keys;
mod hub;
mod internal_error;
mod knobs;
mod loaded;
mod model_card;
mod modelfile;
mod profile;
mod progress;
mod proof;
mod recipe;
mod run_lock;
mod sizes;
mod speaker;
mod speed;
mod terminal;
mod upload;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use clap::Parser;

use crate::args::Arguments;

#[global_allocator]
static HEAP: pronk_kernels::Heap = pronk_kernels::Heap;

fn main() -> ExitCode {
    pronk_kernels::keep_freed_memory();
    pronk_kernels::compute_on_this_thread();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(e) => {
            let _ = e.print();
            // clap exits 2 for a typo; here that code is kept for our own mistakes.
            return ExitCode::from(u8::from(e.use_stderr()));
        }
    };
    terminal::install_error_style();
    internal_error::install();
    match catch_unwind(AssertUnwindSafe(|| commands::run(arguments))) {
        Ok(Ok(code)) => code,
        Ok(Err(report)) => {
            terminal::say(&format!("{:?}", terminal::without_repetition(&report)));
            ExitCode::from(1)
        }
        Err(_) => {
            terminal::say(&internal_error::report());
            ExitCode::from(2)
        }
    }
}
