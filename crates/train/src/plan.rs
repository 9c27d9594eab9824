use pronk_data::{Order, PackedBatch, Rows, epoch_order};

use crate::TrainConfig;

/// Which rows which optimizer step learns from. A step's rows depend on its number alone.
#[derive(Debug, Clone)]
pub struct Plan {
    rows: usize,
    batch_size: usize,
    order: Order,
    seed: u64,
    /// Optimizer steps in all.
    pub total_steps: u64,
}

impl Plan {
    /// For `rows` rows.
    pub fn new(config: &TrainConfig, order: Order, rows: usize) -> Self {
        let per_epoch = rows.div_ceil(config.batch_size);
        let by_epochs = (config.epochs * per_epoch as f64).ceil() as u64;
        let total_steps = config.max_steps.unwrap_or(by_epochs);
        Self { rows, batch_size: config.batch_size, order, seed: config.seed, total_steps }
    }

    /// Passes over the rows when `step` steps are done.
    pub fn epoch(&self, step: u64) -> f64 {
        step as f64 / self.rows.div_ceil(self.batch_size).max(1) as f64
    }

    /// The rows of step number `step`, counted from zero. The last step of an epoch may have fewer.
    pub fn rows(&self, step: u64) -> Vec<usize> {
        let per_epoch = self.rows.div_ceil(self.batch_size).max(1) as u64;
        let (epoch, within) = (step / per_epoch, (step % per_epoch) as usize);
        let order = epoch_order(self.rows, self.order, self.seed, epoch);
        order.into_iter().skip(within * self.batch_size).take(self.batch_size).collect()
    }

    /// The rows of `step`, laid end to end, `size` records a micro-batch.
    pub fn micro_batches(&self, step: u64, rows: &Rows, size: usize) -> Vec<PackedBatch> {
        laid_out(rows, &self.rows(step), size)
    }

    /// Of the micro-batches of the first epoch the one with the most tokens.
    pub fn largest_micro_batch(&self, rows: &Rows, size: usize) -> PackedBatch {
        let steps = (self.rows.div_ceil(self.batch_size) as u64).min(self.total_steps);
        let tokens = |part: &Vec<usize>| -> usize {
            part.iter().filter_map(|&i| rows.get(i)).map(|row| row.tokens()).sum()
        };
        let order = epoch_order(self.rows, self.order, self.seed, 0);
        let steps = order.chunks(self.batch_size).take(steps as usize);
        let parts = steps.flat_map(|step| step.chunks(size).map(<[usize]>::to_vec));
        lay_out(rows, &parts.max_by_key(tokens).unwrap_or_default())
    }
}

/// Rows `size` records at a time, each time laid end to end.
pub(crate) fn laid_out(rows: &Rows, indices: &[usize], size: usize) -> Vec<PackedBatch> {
    indices.chunks(size).map(|part| lay_out(rows, part)).collect()
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
        let plan = Plan::new(&config, Order::Shuffle, 10);
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
        let plan = Plan::new(&config, Order::Sequential, 10);
        assert_eq!((plan.total_steps, plan.rows(2), plan.rows(3)), (5, vec![8, 9], vec![0, 1, 2, 3]));
        assert!((plan.epoch(3) - 1.0).abs() < 1e-12);
    }
}
