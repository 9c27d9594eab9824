//! How much of a step is kept in memory, and how much is computed again.

use burn::tensor::Device;
use bytesize::ByteSize;
use pronk_data::PackedBatch;
use pronk_kernels::computes_on_host;

use crate::{Recompute, Shapes, TrainConfig, TrainError, Workload, available_memory_bytes};

/// Of the memory that is free when a run starts, the share that it may take when no budget is set:
/// people leave their browsers open.
const SHARE: f64 = 0.7;

/// The recipe's wish and what it is measured against.
#[derive(Debug, Clone)]
pub(crate) struct MemoryPlan {
    recompute: Recompute,
    budget: Option<u64>,
    shapes: Shapes,
    /// Set by the recipe, so that going beyond it is an error.
    strict: bool,
}

impl MemoryPlan {
    pub fn new(config: &TrainConfig, shapes: Shapes, device: &Device) -> Self {
        let set = config.memory_budget.map(|budget| budget.as_u64());
        let free = || available_memory_bytes().map(|free| (free as f64 * SHARE) as u64);
        // Of a graphics card's memory nobody tells: there, without a budget, blocks run again.
        let budget = set.or_else(|| computes_on_host(device).then(free).flatten());
        Self { recompute: config.recompute, budget, shapes, strict: set.is_some() }
    }

    /// How many blocks keep their graphs while `batch` goes through.
    pub fn kept(&self, batch: &PackedBatch) -> usize {
        self.shapes.kept(self.recompute, batch.into(), self.budget)
    }

    /// Refuses a budget that the largest micro-batch does not fit in.
    pub fn check(&self, largest: &PackedBatch) -> Result<(), TrainError> {
        let (Some(budget), true) = (self.budget, self.strict) else { return Ok(()) };
        let work = Workload::from(largest);
        let least = match self.recompute {
            Recompute::None => self.shapes.footprint(work, usize::MAX).peak(),
            Recompute::Auto | Recompute::Blocks => self.shapes.footprint(work, 0).peak(),
        };
        if least <= budget {
            return Ok(());
        }
        let (budget, least) = (ByteSize(budget), ByteSize(least));
        Err(TrainError::Budget { budget, tokens: work.tokens, least })
    }
}
