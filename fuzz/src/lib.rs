//! Every reader of what comes from outside, driven by bytes: whatever they are, it gives a value or an error, and
//! neither panics, nor takes memory by a length it was told, nor goes on for ever.
//!
//! One list for both who use it: cargo-fuzz (`scripts/fuzz`), and the test `hostile_bytes` of `pronk-cli`, which is this
//! file compiled on stable and tries changes of the committed inputs.
#![allow(missing_docs, dead_code)] // no library of anyone's; the fuzzer and the test each use a part
#![allow(clippy::unwrap_used, clippy::expect_used)] // a panic is the report

mod folder;
mod recipes;
mod records;
mod texts;
mod weights;

#[cfg(test)]
mod mutations;

// A part of the binary that a library could not be made of for this alone, and the two functions it asks for.
mod datasets;
#[path = "../../crates/cli/src/knobs.rs"]
mod knobs;
#[path = "../../crates/cli/src/recipe.rs"]
mod recipe;

/// A reader, by the name of its target and of the folder of its inputs in `corpus/`.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 14] = [
    ("adapter", weights::adapter),
    ("chat_template", texts::chat_template),
    ("checkpoint", weights::checkpoint),
    ("config", weights::config),
    ("gguf", weights::gguf),
    ("gguf_adapter", weights::gguf_adapter),
    ("gguf_vocabulary", texts::gguf_vocabulary),
    ("prepared", records::prepared),
    ("pytorch", weights::pytorch),
    ("recipe", recipes::recipe),
    ("records", records::records),
    ("safetensors", weights::safetensors),
    ("tables", records::tables),
    ("tokenizer", texts::tokenizer),
];

/// Drives the target called `name`.
///
/// # Panics
///
/// Where there is no such target; and where its reader has a mistake.
pub fn run(name: &str, bytes: &[u8]) {
    let (_, target) = TARGETS.iter().find(|(known, _)| *known == name).expect("a target of the list");
    target(bytes);
}

/// Lets a panic that its reader turns into an error pass the fuzzer's panic hook, which would end the process.
pub fn let_guarded_panics_pass() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !pronk_data::is_guarded() {
            hook(info);
        }
    }));
}
