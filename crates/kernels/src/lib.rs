//! pronk-kernels
