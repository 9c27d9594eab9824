//! The committed inputs, and a few thousand changes of each target's: what CI can afford of fuzzing. The same changes
//! every time; a mistake of a reader panics here as it would for a user, and memory taken by a told length ends the
//! process.

use std::alloc::System;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

use cap::Cap;
use rand::{Rng, RngExt, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;

/// Beyond what any of these inputs needs, with all targets at once.
#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, 4 << 30);

/// Changed inputs of each target.
const CHANGED: usize = 4000;
/// Changes of one input at most.
const CHANGES: usize = 4;

/// Numbers that lengths, counts and offsets do badly with, as text.
const NUMBERS: [&str; 8] =
    ["0", "-1", "1e400", "4294967295", "4294967296", "9223372036854775807", "18446744073709551615", "0.5"];

fn inputs(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let mut paths: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// Drives a target with its inputs and with changes of them.
fn withstands(target: &str) {
    let inputs = inputs(target);
    assert!(!inputs.is_empty(), "fuzz/corpus/{target} is empty");
    for input in &inputs {
        tried(target, input);
    }
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    for _ in 0..CHANGED {
        let mut input = inputs.choose(&mut rng).unwrap().clone();
        let other = inputs.choose(&mut rng).unwrap();
        for _ in 0..rng.random_range(1..=CHANGES) {
            change(&mut input, other, &mut rng);
        }
        tried(target, &input);
    }
}

/// Where the reader panics, the input is left for whoever looks into it.
fn tried(target: &str, input: &[u8]) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| crate::run(target, input))) {
        let path = std::env::temp_dir().join(format!("pronk-fuzz-{target}"));
        fs::write(&path, input).unwrap();
        eprintln!("{target}: panicked over {}", path.display());
        resume_unwind(panic);
    }
}

fn change(input: &mut Vec<u8>, other: &[u8], rng: &mut impl Rng) {
    let end = input.len();
    let at = rng.random_range(0..=end);
    let length = rng.random_range(0..=16.min(end - at));
    match rng.random_range(0..8) {
        0 if at < end => input[at] ^= 1 << rng.random_range(0..8),
        1 if at < end => input[at] = rng.random(),
        2 => drop(input.drain(at..at + length)),
        3 => input.truncate(at),
        4 => {
            let piece = input[at..at + length].to_vec();
            let times = rng.random_range(1..64);
            input.splice(at..at, piece.repeat(times));
        }
        5 => {
            let from = rng.random_range(0..=other.len());
            let to = rng.random_range(from..=other.len().min(from + 64));
            input.splice(at..at + length, other[from..to].iter().copied());
        }
        6 => {
            let number: u64 = rng.random::<u64>() >> rng.random_range(0..64);
            let wide = number.to_le_bytes();
            let width = rng.random_range(1..=wide.len().min(end - at + 1));
            input.splice(at..(at + width).min(end), wide[..width].iter().copied());
        }
        _ => {
            // A number in a text gives way to another.
            let is_digit = |&at: &usize| input[at].is_ascii_digit();
            let Some(from) = (at..end).find(is_digit) else { return };
            let to = (from..end).find(|at| !is_digit(at)).unwrap_or(end);
            input.splice(from..to, NUMBERS.choose(rng).unwrap().bytes());
        }
    }
}

/// Changes of what is refused in its first lines would reach nothing behind them.
#[test]
fn the_committed_checkpoints_are_whole() {
    assert!(inputs("checkpoint").iter().all(|input| crate::weights::is_whole_checkpoint(input)));
}

/// A test for every target, named as it is.
macro_rules! targets_withstand_changes {
    ($($target:ident),*) => {
        $(#[test]
        fn $target() {
            withstands(stringify!($target));
        })*

        #[test]
        fn every_target_is_tried() {
            assert_eq!(crate::TARGETS.map(|(name, _)| name), [$(stringify!($target)),*]);
        }
    };
}

targets_withstand_changes!(
    adapter,
    chat_template,
    checkpoint,
    config,
    gguf,
    gguf_adapter,
    gguf_vocabulary,
    prepared,
    pytorch,
    recipe,
    records,
    safetensors,
    tables,
    tokenizer
);
