//! pronk-cli
