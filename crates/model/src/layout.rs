use std::ops::Range;

use burn::tensor::Device;
use pronk_kernels::{RopeScaling, Rotary, RotaryTables, Span};

use crate::DecoderConfig;

/// The rotary embeddings of a decoder.
#[derive(Debug, Clone)]
pub struct Rotaries {
    whole: Rotary,
    /// Of blocks that see a window only, where it is another.
    local: Option<Rotary>,
}

impl Rotaries {
    /// Those that a configuration describes.
    pub fn new(config: &DecoderConfig) -> Self {
        let local = config.rope_local_base_freq;
        Self {
            whole: Rotary::new(config.head_dim, config.rope_theta, config.rope_scaling),
            local: local.map(|theta| Rotary::new(config.head_dim, theta, RopeScaling::None)),
        }
    }
}

/// Where the rows of a batch stand: which record they belong to, and at which position in it.
#[derive(Debug, Clone)]
pub struct Layout {
    rotary: RotaryTables,
    local: Option<RotaryTables>,
    pub(crate) spans: Vec<Span>,
}

impl Layout {
    /// Records lying one after another, `documents` their rows, `positions` one for each row.
    pub(crate) fn documents(
        rotaries: &Rotaries,
        positions: &[u32],
        documents: &[Range<usize>],
        device: &Device,
    ) -> Self {
        Self::new(rotaries, positions, documents.iter().cloned().map(Span::document).collect(), device)
    }

    /// `rows` new tokens behind the `before` tokens that a cache holds.
    pub(crate) fn continuation(rotaries: &Rotaries, before: usize, rows: usize, device: &Device) -> Self {
        let positions: Vec<u32> = (before..before + rows).map(|p| p as u32).collect();
        Self::new(rotaries, &positions, vec![Span { queries: 0..rows, keys: 0..before + rows }], device)
    }

    fn new(rotaries: &Rotaries, positions: &[u32], spans: Vec<Span>, device: &Device) -> Self {
        let tables = |rotary: &Rotary| rotary.tables(positions, device);
        Self { rotary: tables(&rotaries.whole), local: rotaries.local.as_ref().map(tables), spans }
    }

    /// The angles of a block, which sees all of a record or a window of it.
    pub(crate) fn rotary(&self, windowed: bool) -> &RotaryTables {
        self.local.as_ref().filter(|_| windowed).unwrap_or(&self.rotary)
    }
}
