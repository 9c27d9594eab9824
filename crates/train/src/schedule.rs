use serde::{Deserialize, Serialize};

/// What becomes of the learning rate after the warmup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Half a cosine down to zero.
    Cosine,
    /// A straight line down to zero.
    Linear,
    /// It stays.
    Constant,
}

/// The learning rate of optimizer step number `step`, counted from zero, as transformers'
/// `get_scheduler` gives it: a rise from zero over `warmup` steps, then the schedule.
pub fn learning_rate(schedule: Schedule, peak: f64, warmup: u64, total: u64, step: u64) -> f64 {
    if step < warmup {
        return peak * step as f64 / warmup as f64;
    }
    let progress = (step - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
    let factor = match schedule {
        Schedule::Constant => 1.0,
        Schedule::Linear => 1.0 - progress,
        Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
    };
    peak * factor.max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_transformers() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../../tests/golden/optimizer.json")).unwrap();
        let golden = &golden["schedules"];
        for (name, schedule) in
            [("cosine", Schedule::Cosine), ("linear", Schedule::Linear), ("constant", Schedule::Constant)]
        {
            let expected = golden[name].as_array().unwrap();
            assert_eq!(expected.len(), 20);
            let peak = expected.iter().map(|v| v.as_f64().unwrap()).fold(0.0, f64::max);
            for (step, value) in (0..).zip(expected) {
                let ours = learning_rate(schedule, peak, 4, 20, step);
                assert!(
                    (ours - value.as_f64().unwrap()).abs() < 1e-12 * peak,
                    "{name} {step}: {ours} {value}"
                );
            }
        }
    }
}
