//! What a run left in its folder.

use crate::error::CliError;
use serde::Deserialize;
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::path::Path;

/// The most bytes read of a file: far more than any run writes, far less than would fill the memory.
const MAX_BYTES: u64 = 1 << 30;

/// A line of `metrics.jsonl`; a step has a loss, an evaluation an `eval_loss`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Line {
    /// Steps finished.
    pub step: u64,
    /// Mean loss over supervised tokens.
    pub loss: Option<f64>,
    /// Rate of the update.
    pub learning_rate: Option<f64>,
    /// 2-norm of the gradient.
    pub grad_norm: Option<f64>,
    /// Tokens a second.
    pub tokens_per_second: Option<f64>,
    /// Tokens of the step.
    pub tokens: Option<f64>,
    /// Peak memory so far.
    pub peak_memory_bytes: Option<f64>,
    /// Validation loss.
    pub eval_loss: Option<f64>,
    /// exp of it.
    pub eval_perplexity: Option<f64>,
    /// Share of supervised tokens that are the most likely one.
    pub eval_token_accuracy: Option<f64>,
    /// Share of generations that equal the reference.
    pub eval_exact_match: Option<f64>,
}

/// A line of `generations.jsonl`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Generation {
    /// Steps finished.
    pub step: u64,
    /// The text before the answer.
    pub prompt: String,
    /// The answer of the data.
    pub reference: String,
    /// The model's answer.
    pub generated: String,
    /// Whether the two are the same.
    pub matched: bool,
}

/// The answers to one prompt.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Before the first step, if it was asked for.
    pub before: Option<Generation>,
    /// At the end.
    pub after: Generation,
}

/// A run's files.
#[derive(Debug, Clone)]
pub struct Run {
    /// `run.json`; null where there is none.
    pub info: Value,
    /// Steps, in order.
    pub steps: Vec<Line>,
    /// Evaluations, in order.
    pub evaluations: Vec<Line>,
    /// Samples, in the order of the data.
    pub samples: Vec<Sample>,
}

impl Run {
    /// Reads the run in `dir`. Lines that are torn, as a killed run leaves them, are passed over.
    ///
    /// # Errors
    /// A folder with neither `run.json` nor `metrics.jsonl`, a `run.json` that is no JSON, and failures to read.
    pub fn read(dir: &Path) -> Result<Self, CliError> {
        let info_path = dir.join("run.json");
        let info = match open(&info_path)? {
            Some(file) => serde_json::from_reader(file).map_err(|error| CliError::Inspect {
                path: info_path.display().to_string(),
                message: error.to_string(),
            })?,
            None => Value::Null,
        };
        let lines: Vec<Line> = lines(&dir.join("metrics.jsonl"))?;
        if info.is_null() && lines.is_empty() {
            let message = "is no run's folder: it has neither run.json nor metrics.jsonl".to_string();
            return Err(CliError::Inspect { path: dir.display().to_string(), message });
        }
        let (evaluations, steps): (Vec<Line>, Vec<Line>) =
            lines.into_iter().partition(|line| line.eval_loss.is_some());
        let samples = samples(lines_of_generations(dir)?);
        Ok(Self { info, steps, evaluations, samples })
    }

    /// The value at `pointer` in `run.json`; null where there is none.
    pub fn get(&self, pointer: &str) -> &Value {
        self.info.pointer(pointer).unwrap_or(&Value::Null)
    }

    /// The last finished step.
    pub fn last_step(&self) -> u64 {
        self.steps.iter().chain(&self.evaluations).map(|line| line.step).max().unwrap_or(0)
    }

    /// The evaluation before the first step.
    pub fn before(&self) -> Option<&Line> {
        self.evaluations.iter().find(|line| line.step == 0)
    }

    /// The newest evaluation after a step.
    pub fn after(&self) -> Option<&Line> {
        self.evaluations.iter().rev().find(|line| line.step > 0)
    }
}

fn lines_of_generations(dir: &Path) -> Result<Vec<Generation>, CliError> {
    lines(&dir.join("generations.jsonl"))
}

/// Pairs the first evaluation's answers with the last one's, by prompt.
fn samples(generations: Vec<Generation>) -> Vec<Sample> {
    let first = generations.iter().map(|generation| generation.step).min();
    let last = generations.iter().map(|generation| generation.step).max();
    let mut before: Vec<Option<Generation>> =
        generations.iter().filter(|g| Some(g.step) == first && first != last).cloned().map(Some).collect();
    let after = generations.into_iter().filter(|g| Some(g.step) == last);
    let pair = |(index, after): (usize, Generation)| {
        // The same examples are answered each time, so the places agree; the prompt decides all the same.
        let same = |slot: &Option<Generation>| slot.as_ref().is_some_and(|g| g.prompt == after.prompt);
        let at = match before.get(index) {
            Some(slot) if same(slot) => Some(index),
            _ => before.iter().position(same),
        };
        Sample { before: at.and_then(|at| before[at].take()), after }
    };
    after.enumerate().map(pair).collect()
}

fn open(path: &Path) -> Result<Option<impl BufRead + use<>>, CliError> {
    match File::open(path) {
        Ok(file) => Ok(Some(BufReader::new(file.take(MAX_BYTES)))),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(CliError::Io { path: path.to_path_buf(), source }),
    }
}

fn lines<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Vec<T>, CliError> {
    let Some(mut file) = open(path)? else { return Ok(Vec::new()) };
    let io = |source| CliError::Io { path: path.to_path_buf(), source };
    let mut parsed = Vec::new();
    let mut line = Vec::new();
    while file.read_until(b'\n', &mut line).map_err(io)? > 0 {
        parsed.extend(serde_json::from_slice::<T>(&line).ok());
        line.clear();
    }
    Ok(parsed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_paired_by_prompt() {
        let generation =
            |step, prompt: &str| Generation { step, prompt: prompt.into(), ..Default::default() };
        let all = vec![
            generation(0, "a"),
            generation(0, "b"),
            generation(5, "a"),
            generation(9, "b"),
            generation(9, "a"),
            generation(9, "c"),
        ];
        let paired: Vec<(String, bool)> =
            samples(all).into_iter().map(|s| (s.after.prompt, s.before.is_some())).collect();
        assert_eq!(paired, [("b".into(), true), ("a".into(), true), ("c".into(), false)]);
        assert!(samples(vec![generation(3, "a")])[0].before.is_none());
    }
}
