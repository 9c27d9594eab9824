//! pronk-lora
