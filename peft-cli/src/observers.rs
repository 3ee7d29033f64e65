//! What watches a run: people on stderr, and TensorBoard where the recipe asks for it.

use crate::error::CliError;
use crate::render;
use crate::tensorboard::EventFile;
use peft_core::train::{EvalMetrics, Observer, StepMetrics};
use serde::Serialize;
use serde_json::Value;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// The progress shown, and the event file.
pub struct Observers {
    /// What people see.
    pub progress: render::Progress,
    output_dir: PathBuf,
    /// Steps between recorded ones, where events are recorded.
    every: Option<u64>,
    events: Option<EventFile>,
    total: u64,
}

impl Observers {
    /// With an event file in `output_dir` where `every` says how many steps apart its events are.
    pub fn new(output_dir: &Path, every: Option<u64>) -> Self {
        let progress = render::Progress::new();
        Self { progress, output_dir: output_dir.to_path_buf(), every, events: None, total: 0 }
    }

    /// An event file with what `metrics.jsonl` holds, which is nothing unless the run continues.
    fn open(&self) -> Result<EventFile, CliError> {
        let path = self.output_dir.join("metrics.jsonl");
        let mut events = EventFile::create(&self.output_dir, seconds())?;
        let text = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
            text => text.map_err(|source| CliError::Io { path, source })?,
        };
        for line in text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
            events.metrics(seconds(), &line)?;
        }
        Ok(events)
    }

    /// Records a line; a file that cannot be written any more is given up, for the run matters more.
    fn record(&mut self, metrics: &impl Serialize) {
        let Some(events) = &mut self.events else { return };
        let line = serde_json::to_value(metrics).unwrap_or_default();
        if let Err(error) = events.metrics(seconds(), &line) {
            self.events = None;
            self.progress.warning(&format!("no more events for TensorBoard: {error}"));
        }
    }
}

fn seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

impl Observer for Observers {
    fn started(&mut self, done: u64, total: u64) {
        self.total = total;
        if self.every.is_some() {
            match self.open() {
                Ok(events) => self.events = Some(events),
                Err(error) => self.progress.warning(&format!("no events for TensorBoard: {error}")),
            }
        }
        self.progress.started(done, total);
    }

    fn step(&mut self, metrics: &StepMetrics) {
        let every = self.every.unwrap_or(1);
        if metrics.step.is_multiple_of(every) || metrics.step == self.total {
            self.record(metrics);
        }
        self.progress.step(metrics);
    }

    fn evaluated(&mut self, metrics: &EvalMetrics) {
        self.record(metrics);
        self.progress.evaluated(metrics);
    }

    fn saved(&mut self, path: &Path) {
        self.progress.saved(path);
    }

    fn warning(&mut self, message: &str) {
        self.progress.warning(message);
    }
}
