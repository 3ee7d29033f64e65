//! `metrics.jsonl`: one object a logged step, one an evaluation.

use super::error::TrainError;
use serde::Serialize;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// A training step.
#[derive(Debug, Clone, Serialize)]
pub struct StepMetrics {
    /// Steps finished, counting this one.
    pub step: u64,
    /// Epochs finished, as a fraction.
    pub epoch: f64,
    /// Mean loss over the step's supervised tokens, before the update, in nats.
    pub loss: f64,
    /// Rate of this step's update.
    pub learning_rate: f64,
    /// 2-norm of the gradient, before clipping.
    pub grad_norm: f64,
    /// Supervised tokens of this step.
    pub supervised_tokens: u64,
    /// Tokens of this step, padding left out.
    pub tokens: u64,
    /// Tokens a second of this step.
    pub tokens_per_second: f64,
    /// Peak memory so far.
    pub peak_memory_bytes: Option<u64>,
}

/// An evaluation during training.
#[derive(Debug, Clone, Serialize)]
pub struct EvalMetrics {
    /// Steps finished.
    pub step: u64,
    /// Mean loss over the validation set's supervised tokens.
    pub eval_loss: f64,
    /// exp(loss).
    pub eval_perplexity: f64,
    /// Share of supervised tokens that are the most likely one.
    pub eval_token_accuracy: f64,
    /// Share of generations that equal the reference, where generations were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_exact_match: Option<f64>,
}

/// Appends lines to `metrics.jsonl`.
pub(super) struct MetricsLog {
    path: PathBuf,
    file: File,
}

impl MetricsLog {
    /// Opens the log of a run that continues after `step`: later lines, and a torn last line, are cut off.
    pub fn open(path: &Path, step: u64) -> Result<Self, TrainError> {
        let io = |source| TrainError::Io { path: path.to_path_buf(), source };
        let mut kept = String::new();
        if step > 0 && path.exists() {
            let old = std::fs::read_to_string(path).map_err(io)?;
            for line in old.lines() {
                let at = serde_json::from_str::<serde_json::Value>(line)
                    .ok()
                    .and_then(|v| v.get("step")?.as_u64());
                if at.is_some_and(|at| at <= step) {
                    kept.push_str(line);
                    kept.push('\n');
                }
            }
        }
        crate::checkpoint::write_file(path, kept.as_bytes())?;
        let file = OpenOptions::new().append(true).open(path).map_err(io)?;
        Ok(Self { path: path.to_path_buf(), file })
    }

    /// Appends one object.
    pub fn write(&mut self, metrics: &impl Serialize) -> Result<(), TrainError> {
        let io = |source| TrainError::Io { path: self.path.clone(), source };
        let mut line = serde_json::to_vec(metrics).map_err(|error| io(error.into()))?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(io)
    }
}
