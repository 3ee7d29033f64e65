//! The course of a run on stderr: a bar on a terminal, now and then a line elsewhere.

use super::bytes;
use indicatif::{ProgressBar, ProgressStyle};
use peft_core::train::{EvalMetrics, Observer, StepMetrics};
use std::io::IsTerminal;
use std::path::Path;
use std::time::Instant;

/// Watches a run.
pub struct Progress {
    bar: Option<ProgressBar>,
    total: u64,
    done: u64,
    started: Instant,
}

impl Progress {
    /// Before the first step.
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| ProgressBar::new(0));
        Self { bar, total: 0, done: 0, started: Instant::now() }
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }

    /// Takes the bar away, for a run that does not reach its end.
    pub fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn eta(&self, step: u64) -> String {
        let finished = step.saturating_sub(self.done).max(1);
        let seconds =
            self.started.elapsed().as_secs_f64() / finished as f64 * self.total.saturating_sub(step) as f64;
        let seconds = seconds.round() as u64;
        format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
    }
}

impl Observer for Progress {
    fn started(&mut self, done: u64, total: u64) {
        (self.done, self.total, self.started) = (done, total, Instant::now());
        if done > 0 {
            self.line(&format!("continuing after step {done} of {total}"));
        }
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len} {msg}") {
                bar.set_style(style);
            }
        }
    }

    fn step(&mut self, m: &StepMetrics) {
        let memory = m.peak_memory_bytes.map_or_else(String::new, |peak| format!(" · peak {}", bytes(peak)));
        let text = format!(
            "loss {:.4} · lr {:.2e} · grad {:.3} · {:.0} tok/s{memory} · ETA {}",
            m.loss,
            m.learning_rate,
            m.grad_norm,
            m.tokens_per_second,
            self.eta(m.step)
        );
        match &self.bar {
            Some(bar) => {
                bar.set_position(m.step);
                bar.set_message(text);
            }
            None => {
                let every = (self.total / 20).max(1);
                if m.step.is_multiple_of(every) || m.step == self.total || m.step == self.done + 1 {
                    eprintln!("step {:>5}/{} · {text}", m.step, self.total);
                }
            }
        }
        if let Some(bar) = self.bar.as_ref().filter(|_| m.step == self.total) {
            bar.finish();
        }
    }

    fn evaluated(&mut self, m: &EvalMetrics) {
        let exact = m
            .eval_exact_match
            .map_or_else(String::new, |share| format!(" · exact match {:.1} %", share * 100.0));
        self.line(&format!(
            "step {:>5} · validation loss {:.4} · perplexity {:.3} · token accuracy {:.1} %{exact}",
            m.step,
            m.eval_loss,
            m.eval_perplexity,
            m.eval_token_accuracy * 100.0
        ));
    }

    fn warning(&mut self, message: &str) {
        super::warning(message);
    }

    fn saved(&mut self, path: &Path) {
        if let Some(bar) = &self.bar {
            bar.println(format!("saved {}", path.display()));
        }
    }
}
