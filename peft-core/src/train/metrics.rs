//! `metrics.jsonl`: one object a logged step, one an evaluation; and how such files are written.

use super::error::TrainError;
use crate::checkpoint::write_file;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalMetrics {
    /// Steps finished.
    pub step: u64,
    /// Mean loss over the validation set's supervised tokens.
    #[serde(deserialize_with = "null_is_nan")]
    pub eval_loss: f64,
    /// exp(loss).
    #[serde(deserialize_with = "null_is_nan")]
    pub eval_perplexity: f64,
    /// Share of supervised tokens that are the most likely one.
    #[serde(deserialize_with = "null_is_nan")]
    pub eval_token_accuracy: f64,
    /// Share of generations that equal the reference, where generations were asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_exact_match: Option<f64>,
}

/// JSON knows no number that is not finite: such a one was written as null.
fn null_is_nan<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// Appends objects to a file that holds one JSON object a line. The file exists once there is a line.
pub(super) struct JsonLines {
    path: PathBuf,
    file: Option<File>,
}

impl JsonLines {
    /// Opens the file of a run that starts or continues: lines that are not to be kept, and a torn last one, are cut
    /// out.
    pub fn open(path: &Path, keep: impl Fn(&Value) -> bool) -> Result<Self, TrainError> {
        let lines = Self { path: path.to_path_buf(), file: None };
        let old = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(lines),
            Err(error) => return Err(lines.io(error)),
        };
        let is_kept = |line: &&[u8]| {
            line.ends_with(b"\n") && serde_json::from_slice::<Value>(line).is_ok_and(|value| keep(&value))
        };
        let kept: Vec<u8> =
            old.split_inclusive(|byte| *byte == b'\n').filter(is_kept).flatten().copied().collect();
        if kept.is_empty() {
            std::fs::remove_file(path).map_err(|error| lines.io(error))?;
        } else if kept != old {
            write_file(path, &kept)?;
        }
        Ok(lines)
    }

    /// Appends one object, in one write.
    pub fn write(&mut self, object: &impl Serialize) -> Result<(), TrainError> {
        let mut line = serde_json::to_vec(object).map_err(|error| self.io(error.into()))?;
        line.push(b'\n');
        if self.file.is_none() {
            let file = OpenOptions::new().create(true).append(true).open(&self.path);
            self.file = Some(file.map_err(|error| self.io(error))?);
        }
        let written = self.file.as_mut().map_or(Ok(()), |file| file.write_all(&line));
        written.map_err(|error| self.io(error))
    }

    /// Flushes what was written to the disk, so that no state saved afterwards can outlive its own lines.
    pub fn sync(&self) -> Result<(), TrainError> {
        self.file.as_ref().map_or(Ok(()), File::sync_data).map_err(|error| self.io(error))
    }

    fn io(&self, source: std::io::Error) -> TrainError {
        TrainError::Io { path: self.path.clone(), source }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    #[test]
    fn lines_are_cut_back_and_appended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut lines = JsonLines::open(&path, |_| true).unwrap();
        assert!(!path.exists());
        for step in 1..4 {
            lines.write(&json!({"step": step})).unwrap();
        }
        lines.sync().unwrap();
        drop(lines);
        // A kill in the middle of a character of the last line.
        let torn = [&std::fs::read(&path).unwrap()[..], b"{\"step\":1,\"\xe2\x9f"].concat();
        std::fs::write(&path, torn).unwrap();
        let mut lines = JsonLines::open(&path, |line| line["step"].as_u64() < Some(3)).unwrap();
        lines.write(&json!({"step": 3, "again": true})).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "{\"step\":1}\n{\"step\":2}\n{\"step\":3,\"again\":true}\n");
        JsonLines::open(&path, |_| false).unwrap();
        assert!(!path.exists());
    }
}
