//! Every operation, forwards and backwards, against plain loops in float64.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test reports by panicking
#![allow(clippy::float_cmp)] // masks and constants are compared exactly

mod adamw;
mod attention;
mod cross_entropy;
mod dropout;
mod features;
mod feed_forward;
mod frozen_formats;
#[cfg(any(feature = "cubecl-cpu", feature = "cuda"))]
mod frozen_on_cards;
mod frozen_products;
mod layers;
mod lent;
mod low_rank;
mod optimizers;
mod reference;
mod residual;
mod rotary;
