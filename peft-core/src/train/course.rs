//! Where a run stands, tensors aside: what a resumed run must know to go on as if nothing had happened.

use super::metrics::EvalMetrics;
use super::selection::Selection;
use serde::{Deserialize, Serialize};

/// Steps, and what evaluations have told so far. Data order and random streams are functions of the seed and the step.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Course {
    /// Steps finished.
    pub step: u64,
    /// The step in progress, where the run was stopped within one.
    pub window: Option<Window>,
    /// The evaluation before the first step.
    pub before: Option<EvalMetrics>,
    /// The last evaluation.
    pub latest: Option<EvalMetrics>,
    /// The best evaluation after a step.
    pub best: Option<EvalMetrics>,
    /// Evaluations since the last one that counted as better.
    pub without_gain: u64,
}

/// A partly accumulated step; its gradients lie beside it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Window {
    /// Micro-batches done.
    pub micro_batches: usize,
    /// Sum of their losses.
    pub loss_sum: f64,
    /// Targets they predicted correctly.
    pub correct: u64,
}

impl Course {
    /// Whether the evaluation after the present step has been done.
    pub fn is_evaluated(&self) -> bool {
        self.latest.as_ref().is_some_and(|latest| latest.step == self.step)
    }

    /// Takes note of an evaluation. As in transformers, any gain makes it the best, and one above the threshold starts
    /// the patience anew. The evaluation before the first step is no candidate.
    pub fn record(&mut self, metrics: EvalMetrics, selection: Option<&Selection>) {
        match selection {
            _ if metrics.step == 0 => self.before = Some(metrics.clone()),
            None => {}
            Some(selection) => {
                let gain = selection.metric.gain(&metrics, self.best.as_ref());
                let threshold = selection.early_stopping.map_or(0.0, |stopping| stopping.threshold);
                self.without_gain = if gain > threshold { 0 } else { self.without_gain + 1 };
                if gain > 0.0 {
                    self.best = Some(metrics.clone());
                }
            }
        }
        self.latest = Some(metrics);
    }

    /// Whether the run has waited long enough for a better evaluation.
    pub fn is_out_of_patience(&self, selection: Option<&Selection>) -> bool {
        let stopping = selection.and_then(|selection| selection.early_stopping);
        stopping.is_some_and(|stopping| self.without_gain >= stopping.patience)
    }

    /// The step whose state a finished run exports.
    pub fn exported_step(&self, selection: Option<&Selection>) -> u64 {
        let best = self.best.as_ref().filter(|_| selection.is_some_and(|s| s.load_best_model_at_end));
        best.map_or(self.step, |best| best.step)
    }

    /// Whether a line of `metrics.jsonl` belongs to the run up to here.
    pub fn keeps_metrics(&self, line: &serde_json::Value) -> bool {
        let Some(step) = line.get("step").and_then(|step| step.as_u64()) else { return false };
        let is_evaluation = line.get("eval_loss").is_some();
        step < self.step || step == self.step && (!is_evaluation || self.is_evaluated())
    }

    /// Whether a line of `generations.jsonl` belongs to the run up to here: those of the start and, where the run had
    /// ended here, of the end.
    pub fn keeps_generation(&self, line: &serde_json::Value) -> bool {
        match line.get("step").and_then(|step| step.as_u64()) {
            Some(0) => self.before.is_some(),
            Some(step) => {
                let answered = self.latest.as_ref().is_some_and(|latest| latest.eval_exact_match.is_some());
                step == self.step && self.is_evaluated() && answered
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::selection::{BestMetric, EarlyStopping};
    use super::*;
    use serde_json::json;

    fn evaluation(step: u64, loss: f64, accuracy: f64) -> EvalMetrics {
        EvalMetrics {
            step,
            eval_loss: loss,
            eval_perplexity: loss.exp(),
            eval_token_accuracy: accuracy,
            eval_exact_match: None,
        }
    }

    fn selection(metric: BestMetric, patience: u64, threshold: f64) -> Selection {
        let early_stopping = Some(EarlyStopping { patience, threshold });
        Selection { metric, load_best_model_at_end: true, early_stopping }
    }

    /// Best step and evaluations without gain after each loss.
    fn after_each(losses: &[f64], selection: &Selection) -> Vec<(u64, u64)> {
        let mut course = Course::default();
        let mut step = 0;
        losses
            .iter()
            .map(|loss| {
                step += 2;
                course.step = step;
                course.record(evaluation(step, *loss, -loss), Some(selection));
                (course.best.as_ref().map_or(0, |best| best.step), course.without_gain)
            })
            .collect()
    }

    #[test]
    fn the_best_and_the_patience_by_hand() {
        let losses = [3.0, 2.0, 1.95, 2.5, f64::NAN, 1.0];
        // 1.95 is the best at step 6, but 0.05 is too small a gain to start the patience anew.
        let expected = [(2, 0), (4, 0), (6, 1), (6, 2), (6, 3), (12, 0)];
        assert_eq!(after_each(&losses, &selection(BestMetric::EvalLoss, 3, 0.1)), expected);
        assert_eq!(after_each(&losses, &selection(BestMetric::EvalTokenAccuracy, 3, 0.1)), expected);
        // A tie is no gain; a metric that is not there never has one.
        assert_eq!(after_each(&[2.0, 2.0], &selection(BestMetric::EvalPerplexity, 1, 0.0)), [(2, 0), (2, 1)]);
        assert_eq!(after_each(&[2.0], &selection(BestMetric::EvalExactMatch, 1, 0.0)), [(0, 1)]);
    }

    #[test]
    fn patience_ends_a_run_and_the_best_is_exported() {
        let rule = selection(BestMetric::EvalLoss, 1, 0.0);
        let mut course = Course { step: 0, ..Course::default() };
        course.record(evaluation(0, 0.1, 0.0), Some(&rule));
        assert!(course.best.is_none() && course.before.is_some() && course.is_evaluated());
        course.step = 2;
        course.record(evaluation(2, 1.0, 0.0), Some(&rule));
        assert!(!course.is_out_of_patience(Some(&rule)));
        course.step = 4;
        assert!(!course.is_evaluated());
        course.record(evaluation(4, 1.5, 0.0), Some(&rule));
        assert!(course.is_out_of_patience(Some(&rule)));
        assert!(!course.is_out_of_patience(None));
        assert_eq!((course.exported_step(Some(&rule)), course.exported_step(None)), (2, 4));
    }

    #[test]
    fn a_course_survives_its_file_to_the_bit() {
        let mut course = Course { step: 3, ..Course::default() };
        course.record(evaluation(3, 0.1 + 0.2, 1.0 / 3.0), Some(&selection(BestMetric::EvalLoss, 1, 0.0)));
        course.window = Some(Window { micro_batches: 2, loss_sum: 1e-17 + 0.7, correct: 5 });
        let text = serde_json::to_string(&course).unwrap();
        assert_eq!(serde_json::from_str::<Course>(&text).unwrap(), course);
        // A loss that is not finite has no number in JSON, and is still one that was measured.
        course.record(evaluation(3, f64::INFINITY, 0.5), None);
        let text = serde_json::to_string(&course).unwrap();
        assert!(serde_json::from_str::<Course>(&text).unwrap().latest.unwrap().eval_loss.is_nan());
    }

    #[test]
    fn lines_of_what_will_be_done_again_are_cut() {
        let mut course = Course { step: 4, ..Course::default() };
        let keeps = |course: &Course, line| course.keeps_metrics(&line);
        assert!(keeps(&course, json!({"step": 4, "loss": 1.0})));
        assert!(!keeps(&course, json!({"step": 5, "loss": 1.0})));
        assert!(keeps(&course, json!({"step": 2, "eval_loss": 1.0})));
        assert!(!keeps(&course, json!({"step": 4, "eval_loss": 1.0})));
        assert!(!keeps(&course, json!({"loss": 1.0})));
        assert!(!course.keeps_generation(&json!({"step": 0})));
        course.record(EvalMetrics { eval_exact_match: Some(0.5), ..evaluation(4, 1.0, 0.0) }, None);
        assert!(keeps(&course, json!({"step": 4, "eval_loss": 1.0})));
        assert!(course.keeps_generation(&json!({"step": 4})));
        assert!(!course.keeps_generation(&json!({"step": 2})));
    }
}
