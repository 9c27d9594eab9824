//! Every operation, forwards and backwards, against plain loops in float64.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test reports by panicking

mod adamw;
mod attention;
mod cross_entropy;
mod dropout;
mod features;
mod reference;
mod rotary;
