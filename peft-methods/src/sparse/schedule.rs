//! When positions are chosen again, and how many of them.
//!
//! Steps are counted as completed: `t = 1, 2, …`. A selection phase opens before the first step and whenever
//! `(t + 1) mod S = 0`, and closes after the step `t` with `t mod S = A`: it collects over the steps `1 … A`, then
//! `S … S + A`, `2S … 2S + A`, and so on.

use serde::{Deserialize, Serialize};

/// How the share of positions that are chosen again falls over the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReselectionPolicy {
    /// `p₀·(1 − t/T)`; the first time all of them, where they were drawn at random.
    #[default]
    Linear,
    /// `p₀·(1 + cos(πt/T))/2`.
    Cosine,
}

/// The course of reselection.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// `S`.
    pub reselection_steps: u64,
    /// `A`, below `S`.
    pub accumulation_steps: u64,
    /// `p₀`.
    pub initial_rate: f64,
    /// How it falls.
    pub policy: ReselectionPolicy,
    /// Whether the first positions were drawn at random.
    pub starts_at_random: bool,
}

impl Schedule {
    /// Whether a phase opens after `step` of `total` steps: only where the run lives to see it close.
    pub fn opens(&self, step: u64, total: u64) -> bool {
        let is_due = step == 0 || (step + 1).is_multiple_of(self.reselection_steps);
        is_due && self.next_close(step) <= total
    }

    /// Whether a phase closes after `step`.
    pub fn closes(&self, step: u64) -> bool {
        step > 0 && step % self.reselection_steps == self.accumulation_steps
    }

    /// The share of positions that leave when a phase closes after `step` of `total`.
    pub fn share(&self, step: u64, total: u64) -> f64 {
        let progress = step as f64 / total as f64;
        match self.policy {
            _ if step > total => 0.0,
            ReselectionPolicy::Linear if self.starts_at_random && step == self.accumulation_steps => 1.0,
            ReselectionPolicy::Linear => self.initial_rate * (1.0 - progress),
            ReselectionPolicy::Cosine => {
                self.initial_rate * (1.0 + (std::f64::consts::PI * progress).cos()) / 2.0
            }
        }
    }

    /// How many of `count` positions leave then, `⌊count·share⌋`.
    pub fn leaving(&self, count: usize, step: u64, total: u64) -> usize {
        ((count as f64 * self.share(step, total)).floor() as usize).min(count)
    }

    /// The first step after `step` that closes a phase.
    fn next_close(&self, step: u64) -> u64 {
        let within = step % self.reselection_steps;
        let first = step - within + self.accumulation_steps;
        if first > step { first } else { first + self.reselection_steps }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINEAR: Schedule = Schedule {
        reselection_steps: 20,
        accumulation_steps: 5,
        initial_rate: 0.2,
        policy: ReselectionPolicy::Linear,
        starts_at_random: true,
    };

    #[test]
    fn a_run_of_a_hundred_steps() {
        let total = 100;
        let closes: Vec<u64> = (0..=total).filter(|step| LINEAR.closes(*step)).collect();
        assert_eq!(closes, [5, 25, 45, 65, 85]);
        let shares = closes.iter().map(|step| LINEAR.share(*step, total));
        for (share, expected) in shares.zip([1.0, 0.15, 0.11, 0.07, 0.03]) {
            assert!((share - expected).abs() < 1e-12, "{share} {expected}");
        }
        // The last would open after step 99, and close after the run.
        let opens: Vec<u64> = (0..=total).filter(|step| LINEAR.opens(*step, total)).collect();
        assert_eq!(opens, [0, 19, 39, 59, 79]);
        assert_eq!(LINEAR.leaving(1000, 5, total), 1000);
        assert_eq!(LINEAR.leaving(99, 45, total), 10);
        assert_eq!(LINEAR.leaving(99, 125, total), 0);
        // Positions of another adapter are not thrown away.
        let given = Schedule { starts_at_random: false, ..LINEAR };
        assert!((given.share(5, total) - 0.19).abs() < 1e-12);
    }

    #[test]
    fn the_cosine_does_not_replace_all_at_first() {
        let cosine = Schedule { policy: ReselectionPolicy::Cosine, ..LINEAR };
        for (step, expected) in [(50, 0.1), (100, 0.0), (25, 0.1 * (1.0 + 0.5f64.sqrt()))] {
            assert!((cosine.share(step, 100) - expected).abs() < 1e-12);
        }
        assert!(cosine.share(5, 100) < 0.2);
    }

    #[test]
    fn phases_may_touch() {
        // It closes after step 3 and the next one opens then.
        let tight = Schedule { reselection_steps: 4, accumulation_steps: 3, ..LINEAR };
        assert!(tight.closes(3) && tight.opens(3, 7) && !tight.opens(3, 6));
        assert!(LINEAR.opens(0, 5) && !LINEAR.opens(0, 4));
    }
}
