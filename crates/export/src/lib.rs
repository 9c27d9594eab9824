//! pronk-export
