use pronk_data::{MicroBatches, Mixture, Order, PackedBatch, Rows, epoch_order};

use crate::TrainConfig;

/// Which rows which optimizer step learns from. A step's rows depend on its number alone.
#[derive(Debug, Clone)]
pub struct Plan {
    mixture: Mixture,
    /// Rows of an epoch.
    rows: usize,
    batch_size: usize,
    order: Order,
    seed: u64,
    /// Optimizer steps in all.
    pub total_steps: u64,
}

impl Plan {
    /// For rows that appear as often as `mixture` says.
    pub fn new(config: &TrainConfig, order: Order, mixture: Mixture) -> Self {
        let rows = mixture.epoch_rows();
        let per_epoch = rows.div_ceil(config.batch_size);
        let by_epochs = (config.epochs * per_epoch as f64).ceil() as u64;
        let total_steps = config.max_steps.unwrap_or(by_epochs);
        Self { mixture, rows, batch_size: config.batch_size, order, seed: config.seed, total_steps }
    }

    /// Passes over the rows when `step` steps are done.
    pub fn epoch(&self, step: u64) -> f64 {
        step as f64 / self.rows.div_ceil(self.batch_size).max(1) as f64
    }

    /// The rows of an epoch, counted from zero, in its order.
    pub fn epoch_rows(&self, epoch: u64) -> Vec<usize> {
        epoch_order(&self.mixture, self.order, self.seed, epoch)
    }

    /// The rows of step number `step`, counted from zero. The last step of an epoch may have fewer.
    pub fn rows(&self, step: u64) -> Vec<usize> {
        let per_epoch = self.rows.div_ceil(self.batch_size).max(1) as u64;
        let (epoch, within) = (step / per_epoch, (step % per_epoch) as usize);
        let order = self.epoch_rows(epoch);
        order.into_iter().skip(within * self.batch_size).take(self.batch_size).collect()
    }

    /// The rows of `step`, shared out among micro-batches and laid end to end in them.
    pub fn micro_batches(&self, step: u64, rows: &Rows, how: MicroBatches) -> Vec<PackedBatch> {
        laid_out(rows, &self.rows(step), how)
    }

    /// Of the micro-batches of the first epoch the one with the most tokens.
    pub fn largest_micro_batch(&self, rows: &Rows, how: MicroBatches) -> PackedBatch {
        lay_out(rows, &self.rows_of_the_largest(rows, how))
    }

    /// What lies in it.
    pub(crate) fn rows_of_the_largest(&self, rows: &Rows, how: MicroBatches) -> Vec<usize> {
        let steps = (self.rows.div_ceil(self.batch_size) as u64).min(self.total_steps);
        let tokens = |part: &Vec<usize>| part.iter().map(|&i| tokens_of(rows, i)).sum::<usize>();
        let order = self.epoch_rows(0);
        let steps = order.chunks(self.batch_size).take(steps as usize);
        let parts = steps.flat_map(|step| shared_out(rows, step, how));
        parts.max_by_key(tokens).unwrap_or_default()
    }
}

/// The micro-batches of some rows, in each of which they lie end to end.
pub(crate) fn laid_out(rows: &Rows, indices: &[usize], how: MicroBatches) -> Vec<PackedBatch> {
    shared_out(rows, indices, how).iter().map(|part| lay_out(rows, part)).collect()
}

fn shared_out(rows: &Rows, indices: &[usize], how: MicroBatches) -> Vec<Vec<usize>> {
    let lengths: Vec<usize> = indices.iter().map(|&i| tokens_of(rows, i)).collect();
    let parts = how.share_out(&lengths).into_iter();
    parts.map(|part| part.into_iter().filter_map(|i| indices.get(i).copied()).collect()).collect()
}

fn tokens_of(rows: &Rows, index: usize) -> usize {
    rows.get(index).map_or(0, |row| row.tokens())
}

fn lay_out(rows: &Rows, indices: &[usize]) -> PackedBatch {
    PackedBatch::concat(indices.iter().filter_map(|&i| rows.get(i)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_sees_every_row_once() {
        let config = TrainConfig { batch_size: 4, epochs: 2.0, ..TrainConfig::default() };
        let plan = Plan::new(&config, Order::Shuffle, Mixture::once(10));
        assert_eq!(plan.total_steps, 6);
        for epoch in 0..2 {
            let mut seen: Vec<usize> = (0..3).flat_map(|s| plan.rows(epoch * 3 + s)).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(plan.rows(0), plan.rows(3));
        assert_eq!(plan.rows(4), plan.rows(4));
    }

    #[test]
    fn sequential_rows_come_as_they_are_and_max_steps_goes_first() {
        let config = TrainConfig { batch_size: 4, max_steps: Some(5), ..TrainConfig::default() };
        let plan = Plan::new(&config, Order::Sequential, Mixture::once(10));
        assert_eq!((plan.total_steps, plan.rows(2), plan.rows(3)), (5, vec![8, 9], vec![0, 1, 2, 3]));
        assert!((plan.epoch(3) - 1.0).abs() < 1e-12);
    }
}
