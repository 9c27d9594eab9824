//! pronk-train
