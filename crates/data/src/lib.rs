//! pronk-data
