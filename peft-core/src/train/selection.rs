//! Choosing among evaluations: the best one, and when to stop waiting for a better one.

use super::metrics::EvalMetrics;
use serde::{Deserialize, Serialize};

/// What makes one evaluation better than another, in Hugging Face's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BestMetric {
    /// Lower is better.
    #[default]
    #[serde(alias = "loss")]
    EvalLoss,
    /// Lower is better.
    #[serde(alias = "perplexity")]
    EvalPerplexity,
    /// Higher is better.
    #[serde(alias = "token_accuracy")]
    EvalTokenAccuracy,
    /// Higher is better; every evaluation then answers the validation examples.
    #[serde(alias = "exact_match")]
    EvalExactMatch,
}

impl BestMetric {
    /// Whether the larger of two values is the better one.
    pub fn greater_is_better(self) -> bool {
        matches!(self, Self::EvalTokenAccuracy | Self::EvalExactMatch)
    }

    /// Its name in `metrics.jsonl`.
    pub fn name(self) -> &'static str {
        match self {
            Self::EvalLoss => "eval_loss",
            Self::EvalPerplexity => "eval_perplexity",
            Self::EvalTokenAccuracy => "eval_token_accuracy",
            Self::EvalExactMatch => "eval_exact_match",
        }
    }

    /// Its value in an evaluation; not a number where that lacks it.
    pub fn value(self, metrics: &EvalMetrics) -> f64 {
        match self {
            Self::EvalLoss => metrics.eval_loss,
            Self::EvalPerplexity => metrics.eval_perplexity,
            Self::EvalTokenAccuracy => metrics.eval_token_accuracy,
            Self::EvalExactMatch => metrics.eval_exact_match.unwrap_or(f64::NAN),
        }
    }

    /// By how much `new` is better than `old`, negative where it is worse. Anything finite is infinitely better than
    /// nothing.
    pub(super) fn gain(self, new: &EvalMetrics, old: Option<&EvalMetrics>) -> f64 {
        let new = self.value(new);
        match old.map(|old| self.value(old)) {
            Some(old) if self.greater_is_better() => new - old,
            Some(old) => old - new,
            None if new.is_finite() => f64::INFINITY,
            None => f64::NAN,
        }
    }
}

/// Stops a run whose evaluations do not get better.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EarlyStopping {
    /// Evaluations in a row without a gain, after which the run stops.
    pub patience: u64,
    /// A gain must be larger than this to count.
    pub threshold: f64,
}

/// What is done about the best evaluation. The checkpoint that belongs to it is saved and never removed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Selection {
    /// What is best.
    pub metric: BestMetric,
    /// Whether the best state is exported instead of the last.
    pub load_best_model_at_end: bool,
    /// Whether, and when, the run ends before its time.
    pub early_stopping: Option<EarlyStopping>,
}

/// How often something is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Every {
    /// Each time so many steps have been finished.
    Steps(u64),
    /// So many times an epoch, at equal distances rounded up to whole steps.
    PerEpoch(u64),
}

impl Every {
    /// Whether it is time after `step`, in a run with `steps_per_epoch`.
    pub(super) fn is_due(self, step: u64, steps_per_epoch: u64) -> bool {
        step.is_multiple_of(self.steps(steps_per_epoch))
    }

    /// Steps between one time and the next.
    pub fn steps(self, steps_per_epoch: u64) -> u64 {
        match self {
            Self::Steps(steps) => steps.max(1),
            Self::PerEpoch(times) => steps_per_epoch.div_ceil(times.max(1)).max(1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_an_epoch_become_steps() {
        assert_eq!(Every::PerEpoch(4).steps(10), 3);
        assert_eq!(Every::PerEpoch(20).steps(10), 1);
        assert!(Every::PerEpoch(1).is_due(20, 10) && !Every::PerEpoch(1).is_due(15, 10));
        assert!(Every::Steps(5).is_due(15, 10));
    }
}
