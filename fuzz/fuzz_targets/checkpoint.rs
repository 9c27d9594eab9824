#![no_main]

libfuzzer_sys::fuzz_target!(init: pronk_fuzz::let_guarded_panics_pass(), |bytes: &[u8]| pronk_fuzz::run("checkpoint", bytes));
