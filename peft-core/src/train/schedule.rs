//! Learning-rate schedules with warm-up, as Hugging Face's `get_scheduler` defines them.

use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// The shape of the learning rate after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Stays.
    Constant,
    /// Falls to 0 in a line.
    Linear,
    /// Falls to 0 along half a cosine.
    #[default]
    Cosine,
}

/// Length of the warm-up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Warmup {
    /// In optimizer steps.
    Steps(u64),
    /// As a share of all steps, rounded up.
    Ratio(f64),
}

impl Warmup {
    /// As a share of a run of `total` steps.
    pub fn share(self, total: u64) -> f64 {
        match self {
            Warmup::Steps(steps) => steps as f64 / total.max(1) as f64,
            Warmup::Ratio(ratio) => ratio,
        }
    }

    /// In steps of a run of `total`.
    pub fn steps(self, total: u64) -> u64 {
        match self {
            Warmup::Steps(steps) => steps,
            Warmup::Ratio(ratio) => (total as f64 * ratio).ceil() as u64,
        }
    }
}

impl Schedule {
    /// The factor on the peak rate for the update after `step` finished ones, in a run of `total` with `warmup` steps.
    /// The first warm-up step has factor 0.
    pub fn factor(self, step: u64, warmup: u64, total: u64) -> f64 {
        if step < warmup {
            return step as f64 / warmup.max(1) as f64;
        }
        let rest = total.saturating_sub(warmup).max(1) as f64;
        match self {
            Schedule::Constant => 1.0,
            Schedule::Linear => total.saturating_sub(step) as f64 / rest,
            Schedule::Cosine => (0.5 * (1.0 + (PI * (step - warmup) as f64 / rest).cos())).max(0.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_up_and_fall_by_hand() {
        let linear = |step| Schedule::Linear.factor(step, 2, 6);
        assert_eq!([linear(0), linear(1), linear(2), linear(3), linear(5)], [0.0, 0.5, 1.0, 0.75, 0.25]);
        assert!((Schedule::Cosine.factor(4, 2, 6) - 0.5).abs() < 1e-12);
        assert_eq!(Schedule::Constant.factor(5, 2, 6), 1.0);
        assert_eq!(Warmup::Ratio(0.1).steps(15), 2);
        assert_eq!((Warmup::Ratio(0.1).share(15), Warmup::Steps(3).share(15)), (0.1, 0.2));
    }
}
