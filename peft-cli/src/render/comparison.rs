//! The course of a comparison on stderr: a bar on a terminal, a line for each run.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often the running run's metrics are looked at.
const PAUSE: Duration = Duration::from_millis(500);

/// Watches a comparison.
pub struct ComparisonProgress {
    bar: Option<ProgressBar>,
    total: usize,
    done: usize,
    looked: Instant,
}

impl ComparisonProgress {
    /// Before the first of `total` runs.
    pub fn new(total: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| ProgressBar::new(total as u64));
        if let Some((bar, style)) =
            bar.as_ref().zip(ProgressStyle::with_template("{bar:24} {pos}/{len} {wide_msg}").ok())
        {
            bar.set_style(style);
        }
        Self { bar, total, done: 0, looked: Instant::now() }
    }

    /// Shows how far the running runs have come, by their names and the last lines of their metrics.
    pub fn look<'a>(&mut self, running: impl Iterator<Item = (&'a str, PathBuf)>) {
        let Some(bar) = self.bar.as_ref().filter(|_| self.looked.elapsed() > PAUSE) else { return };
        self.looked = Instant::now();
        let course = |(name, metrics): (&str, PathBuf)| match last_step(&metrics) {
            Some(step) => format!("{name} · step {step}"),
            None => name.to_string(),
        };
        bar.set_message(running.map(course).collect::<Vec<_>>().join(", "));
    }

    /// A run ended, or had ended before.
    pub fn ended(&mut self, name: &str, said: &str) {
        self.done += 1;
        if let Some(bar) = &self.bar {
            bar.inc(1);
        }
        self.print(&format!("{:>3}/{} {name} · {}", self.done, self.total, super::printable(said)));
    }

    /// Something happened to a run that goes on.
    pub fn note(&self, name: &str, said: &str) {
        self.print(&format!("{name} · {}", super::printable(said)));
    }

    fn print(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None => eprintln!("{line}"),
        }
    }

    /// Takes the bar away.
    pub fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// The step of the last whole line.
fn last_step(metrics: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(metrics).ok()?;
    let last = text.lines().rev().find_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())?;
    last["step"].as_u64()
}
