//! pronk-model
