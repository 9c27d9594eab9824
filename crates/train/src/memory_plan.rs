//! How much of a step is kept in memory, how much is computed again, and how large a micro-batch may be.

use bytesize::ByteSize;
use pronk_data::{MicroBatches, PackedBatch, Rows};

use crate::{
    Keep, Plan, Recompute, SavedInputs, Shapes, TrainConfig, TrainError, Workload, available_memory_bytes,
};

/// Of the memory that is free when a run starts, the share that it may take when no budget is set:
/// people leave their browsers open.
const SHARE: f64 = 0.7;

/// The recipe's wish and what it is measured against.
#[derive(Debug, Clone)]
pub struct MemoryPlan {
    recompute: Recompute,
    inputs: SavedInputs,
    budget: Option<u64>,
    shapes: Shapes,
    /// Set by the recipe, so that going beyond it is an error.
    strict: bool,
}

impl MemoryPlan {
    /// For computing in the memory that `shapes` is of.
    pub fn new(config: &TrainConfig, shapes: Shapes) -> Self {
        let set = config.memory_budget.map(|budget| budget.as_u64());
        let free = || available_memory_bytes().map(|free| (free as f64 * SHARE) as u64);
        let recompute = match (config.recompute, config.saved_inputs, set) {
            // A block that runs again from a rounded input computes other bits than one that is kept: how many do must
            // not depend on the memory that happens to be free, or a resumed run is another run.
            (Recompute::Auto, SavedInputs::Bf16, None) => Recompute::Blocks,
            (asked, ..) => asked,
        };
        Self {
            recompute,
            inputs: config.saved_inputs,
            // Of a graphics card's memory nobody tells: there, without a budget, blocks run again.
            budget: set.or_else(|| if shapes.on_card() { None } else { free() }),
            shapes: shapes.saving(config.saved_inputs).stepping(config.optimizer),
            strict: set.is_some(),
        }
    }

    /// The same, held against so many bytes.
    #[must_use]
    pub fn within(self, budget: u64) -> Self {
        Self { budget: Some(budget), ..self }
    }

    /// What it is held against, where anybody knows.
    pub fn budget(&self) -> Option<u64> {
        self.budget
    }

    /// What it measures with.
    pub fn shapes(&self) -> &Shapes {
        &self.shapes
    }

    /// What is kept while `batch` goes through.
    pub fn keep(&self, batch: &PackedBatch) -> Keep {
        Keep { graphs: self.kept(batch.into()), inputs: self.inputs }
    }

    /// How many blocks keep their graphs during `work`.
    pub fn kept(&self, work: Workload) -> usize {
        self.shapes.kept(self.recompute, work, self.budget)
    }

    /// Whether `batch` takes less than half of what there is: so little that an account which is a few
    /// percent off cannot be wrong about it.
    pub(crate) fn is_roomy_for(&self, batch: &PackedBatch) -> bool {
        let peak = self.shapes.footprint(batch.into(), self.keep(batch).graphs).peak();
        self.budget.is_some_and(|budget| peak <= budget / 2)
    }

    /// The longest row of at most `most` tokens that fits as a micro-batch of its own, all of it
    /// learned. `None` where not even two tokens do.
    pub fn longest_row(&self, most: usize) -> Option<usize> {
        let fits = |tokens: usize| self.fits(Workload { tokens, supervised: tokens, pairs: tokens * tokens });
        let (mut fitting, mut beyond) = (2, most.max(2) + 1);
        if !fits(fitting) {
            return None;
        }
        while beyond - fitting > 1 {
            let middle = fitting.midpoint(beyond);
            if fits(middle) {
                fitting = middle;
            } else {
                beyond = middle;
            }
        }
        Some(fitting)
    }

    /// The largest of the sizes from one to `most` whose largest micro-batch fits. `None` where none
    /// does, or nobody knows the memory.
    pub fn largest_micro_batch(
        &self,
        plan: &Plan,
        rows: &Rows,
        most: usize,
        of_size: impl Fn(usize) -> MicroBatches,
    ) -> Option<usize> {
        self.budget?;
        let fits = |&size: &usize| self.fits((&plan.largest_micro_batch(rows, of_size(size))).into());
        (1..=most).rev().find(fits)
    }

    /// Refuses a budget that the largest micro-batch does not fit in.
    pub(crate) fn check(&self, largest: &PackedBatch) -> Result<(), TrainError> {
        let (Some(budget), work) = (self.budget.filter(|_| self.strict), Workload::from(largest)) else {
            return Ok(());
        };
        if self.fits(work) {
            return Ok(());
        }
        let (budget, least) = (ByteSize(budget), ByteSize(self.least(work)));
        Err(TrainError::Budget { budget, tokens: work.tokens, least })
    }

    fn fits(&self, work: Workload) -> bool {
        self.budget.is_none_or(|budget| self.least(work) <= budget)
    }

    /// What `work` takes when as little is kept as the recipe allows.
    fn least(&self, work: Workload) -> u64 {
        let graphs = if self.recompute == Recompute::None { usize::MAX } else { 0 };
        self.shapes.footprint(work, graphs).peak()
    }
}

#[cfg(test)]
mod tests {
    use pronk_data::{Mixture, Order, TokenizedExample};

    use super::*;
    use crate::footprint::tests::shapes;

    /// Held against so many bytes, with nothing kept that can be computed again.
    fn within(budget: u64) -> MemoryPlan {
        let config = TrainConfig { recompute: Recompute::Blocks, ..TrainConfig::default() };
        MemoryPlan::new(&config, shapes()).within(budget)
    }

    fn peak(tokens: usize, supervised: usize) -> u64 {
        shapes().footprint(Workload { tokens, supervised, pairs: 0 }, 0).peak()
    }

    #[test]
    fn only_half_of_the_memory_is_room_enough() {
        let row = TokenizedExample { token_ids: vec![1; 100], loss_mask: vec![true; 100] };
        let batch = PackedBatch::concat([row.view()]);
        let needed = peak(batch.tokens(), batch.supervised());
        assert!(within(2 * needed).is_roomy_for(&batch));
        assert!(!within(2 * needed - 2).is_roomy_for(&batch));
    }

    #[test]
    fn what_is_free_decides_nothing_that_changes_bits() {
        let work = Workload { tokens: 100, supervised: 50, pairs: 0 };
        let kept = |saved_inputs, memory_budget| {
            let config = TrainConfig { saved_inputs, memory_budget, ..TrainConfig::default() };
            MemoryPlan::new(&config, shapes()).kept(work)
        };
        let budget = Some(ByteSize::tb(1));
        assert_eq!(kept(SavedInputs::Bf16, None), 0);
        assert!(kept(SavedInputs::Bf16, budget) > 0);
        assert!(kept(SavedInputs::F32, None) > 0);
    }

    #[test]
    fn the_longest_row_is_the_longest_that_fits() {
        assert_eq!(within(peak(300, 300)).longest_row(2048), Some(300));
        assert_eq!(within(peak(300, 300) - 1).longest_row(2048), Some(299));
        assert_eq!(within(u64::MAX).longest_row(2048), Some(2048));
        assert_eq!(within(peak(2, 2) - 1).longest_row(2048), None);
    }

    #[test]
    fn the_largest_micro_batch_is_the_largest_that_fits() {
        let row = TokenizedExample { token_ids: vec![1; 100], loss_mask: vec![true; 100] };
        let rows: Rows = [&row, &row, &row, &row].into_iter().collect();
        let config = TrainConfig { batch_size: 4, ..TrainConfig::default() };
        let plan = Plan::new(&config, Order::Sequential, Mixture::once(4));
        // The first token of a row is never learned.
        let found = |budget| {
            let packed = |size| MicroBatches::Packed { tokens: 100 * size };
            within(budget).largest_micro_batch(&plan, &rows, 4, packed)
        };
        assert_eq!(found(peak(300, 297)), Some(3));
        assert_eq!(found(peak(300, 297) - 1), Some(2));
        assert_eq!(found(peak(100, 99) - 1), None);
        assert_eq!(found(u64::MAX), Some(4));
    }
}
