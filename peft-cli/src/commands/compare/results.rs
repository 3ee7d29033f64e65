//! What runs measured, and the row that a method gets from its runs.

use super::plan::{Plan, Wanted};
use crate::error::CliError;
use crate::report::Run;
use serde::Serialize;
use std::path::Path;

/// The figures of a finished run.
#[derive(Debug, Clone, Serialize)]
pub struct Measured {
    /// Validation loss at the end, nats a token.
    pub loss: f64,
    /// Share of supervised validation tokens that are the most likely one.
    pub token_accuracy: f64,
    /// Share of answers that equal the reference, where answers were asked for.
    pub exact_match: Option<f64>,
    /// Trained parameters.
    pub trainable: u64,
    /// Weight files of the result.
    pub file_bytes: u64,
    /// Peak memory of the whole process, or of the device.
    pub peak_bytes: Option<u64>,
    /// Mean time of a step.
    pub step_seconds: f64,
    /// Tokens a second of training steps.
    pub tokens_per_second: f64,
    /// When its process began and ended, in seconds since 1970, where the run wrote it down.
    pub span: Option<(f64, f64)>,
}

impl Measured {
    /// Reads the figures of the finished run in `dir`.
    ///
    /// # Errors
    /// Failures to read.
    pub fn read(dir: &Path) -> Result<Result<Self, String>, CliError> {
        Ok(Self::of(&Run::read(dir)?, file_bytes(dir)))
    }

    fn of(run: &Run, file_bytes: u64) -> Result<Self, String> {
        let after = |key: &str| run.get(&format!("/result/after/{key}")).as_f64();
        let loss = after("eval_loss").ok_or("its validation loss is not finite")?;
        let (tokens, seconds, steps) = timed(run);
        if steps == 0 {
            return Err("it has no timed step".to_string());
        }
        let peak = run.steps.iter().filter_map(|line| line.peak_memory_bytes).fold(0.0, f64::max) as u64;
        let peak = run.get("/result/peak_memory_bytes").as_u64().unwrap_or(0).max(peak);
        let (ended_at, took) = (run.get("/ended_at").as_f64(), run.get("/total_seconds").as_f64());
        Ok(Self {
            loss,
            token_accuracy: after("eval_token_accuracy").unwrap_or(f64::NAN),
            exact_match: after("eval_exact_match"),
            trainable: run.get("/trainable_parameters").as_u64().unwrap_or(0),
            file_bytes,
            peak_bytes: (peak > 0).then_some(peak),
            step_seconds: seconds / steps as f64,
            tokens_per_second: tokens / seconds,
            span: ended_at.zip(took).map(|(end, took)| (end - took, end)),
        })
    }
}

/// Tokens, seconds and number of the logged steps. The first step, which also allocates and compiles, is left out where
/// there are others.
fn timed(run: &Run) -> (f64, f64, usize) {
    let steps: Vec<(f64, f64)> = run
        .steps
        .iter()
        .filter_map(|line| {
            Some((line.step, line.tokens?, line.tokens_per_second.filter(|speed| *speed > 0.0)?))
        })
        .filter(|(step, ..)| *step > 1 || run.steps.len() == 1)
        .map(|(_, tokens, speed)| (tokens, tokens / speed))
        .collect();
    let sum = |value: fn(&(f64, f64)) -> f64| steps.iter().map(value).sum::<f64>();
    (sum(|step| step.0), sum(|step| step.1), steps.len())
}

/// Bytes of the safetensors files of a run's adapter or model.
pub fn file_bytes(dir: &Path) -> u64 {
    let entries = ["adapter", "model"].into_iter().filter_map(|name| std::fs::read_dir(dir.join(name)).ok());
    let files = entries.flatten().flatten();
    let weights = files.filter(|file| file.path().extension().is_some_and(|kind| kind == "safetensors"));
    weights.filter_map(|file| file.metadata().ok()).map(|metadata| metadata.len()).sum()
}

/// What came of a run.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// It has a result.
    Measured(Measured),
    /// It ended without; why.
    Failed(String),
    /// It has not been run to its end.
    Missing,
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::Measured(measured) => write!(f, "validation loss {:.4}", measured.loss),
            Self::Failed(reason) => write!(f, "failed: {reason}"),
            Self::Missing => f.write_str("not run to its end"),
        }
    }
}

/// The most runs that went on at one time.
pub fn at_once(outcomes: &[Outcome]) -> usize {
    let spans: Vec<(f64, f64)> = outcomes
        .iter()
        .filter_map(|outcome| match outcome {
            Outcome::Measured(measured) => measured.span,
            _ => None,
        })
        .collect();
    let at = |time: f64| spans.iter().filter(|(begin, end)| *begin <= time && time < *end).count();
    spans.iter().map(|(begin, _)| at(*begin)).max().unwrap_or(0)
}

/// Mean and spread over seeds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The mean.
    pub mean: f64,
    /// The sample's standard deviation; null for one seed.
    pub deviation: Option<f64>,
}

impl Spread {
    /// Of at least one value.
    pub fn of(values: &[f64]) -> Option<Self> {
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let deviation = (values.len() > 1).then(|| (squares / (count - 1.0)).sqrt());
        (!values.is_empty()).then_some(Self { mean, deviation })
    }
}

/// The figures of a method at its chosen rate, over the seeds.
#[derive(Debug, Clone, Serialize)]
pub struct Figures {
    /// The chosen rate.
    pub learning_rate: f64,
    /// Validation loss.
    pub loss: Spread,
    /// Share of validation tokens.
    pub token_accuracy: Spread,
    /// Share of answers; null where none were asked for.
    pub exact_match: Option<Spread>,
    /// Trained parameters.
    pub trainable: u64,
    /// Weight files of the result, the largest of the seeds.
    pub file_bytes: u64,
    /// The largest peak of the seeds.
    pub peak_bytes: Option<u64>,
    /// That, as a multiple of the first method's that has figures.
    pub memory: Option<f64>,
    /// Time of a step.
    pub step_seconds: Spread,
    /// Tokens a second of training steps.
    pub tokens_per_second: Spread,
    /// That, as a multiple of the first method's that has figures.
    pub speed: f64,
}

/// A method's row.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The method's label.
    pub label: String,
    /// Its figures; null where no rate has a result with every seed.
    pub figures: Option<Figures>,
    /// Mean validation loss of every rate that has a result with every seed.
    pub sweep: Vec<(f64, f64)>,
    /// What else there is to know: runs that failed or are missing, a best rate at the end of those tried.
    pub remarks: Vec<String>,
}

/// Every method's row, in the order of the recipe; `outcomes` belong to the plan's runs.
pub fn rows(plan: &Plan, outcomes: &[Outcome]) -> Vec<Row> {
    let runs: Vec<(&Wanted, &Outcome)> = plan.runs.iter().zip(outcomes).collect();
    let of_method = |label: &String| {
        let own: Vec<_> = runs.iter().copied().filter(|(wanted, _)| wanted.label == *label).collect();
        row(label, &own, plan.seeds.len())
    };
    let mut rows: Vec<Row> = plan.labels.iter().map(of_method).collect();
    let first = rows.iter().find_map(|row| row.figures.clone());
    for figures in rows.iter_mut().filter_map(|row| row.figures.as_mut()) {
        let Some(first) = &first else { break };
        figures.speed = figures.tokens_per_second.mean / first.tokens_per_second.mean;
        let peaks = figures.peak_bytes.zip(first.peak_bytes);
        figures.memory = peaks.map(|(peak, first)| peak as f64 / first as f64);
    }
    rows
}

/// The row of one method. Its rate is the one with the lowest mean validation loss over the seeds, of those that have a
/// result with every seed.
fn row(label: &str, runs: &[(&Wanted, &Outcome)], seeds: usize) -> Row {
    let mut rates: Vec<f64> = Vec::new();
    runs.iter().for_each(|(wanted, _)| {
        if !rates.contains(&wanted.rate) {
            rates.push(wanted.rate);
        }
    });
    let at = |rate: f64| -> Vec<&Measured> {
        let own = runs.iter().filter(|(wanted, _)| wanted.rate == rate);
        own.filter_map(|(_, outcome)| match outcome {
            Outcome::Measured(measured) => Some(measured),
            _ => None,
        })
        .collect()
    };
    let mean_loss = |rate: f64| {
        let losses: Vec<f64> = at(rate).iter().map(|measured| measured.loss).collect();
        Spread::of(&losses).filter(|_| losses.len() == seeds).map(|loss| loss.mean)
    };
    let sweep: Vec<(f64, f64)> = rates.iter().filter_map(|rate| Some((*rate, mean_loss(*rate)?))).collect();
    let best = sweep.iter().min_by(|a, b| a.1.total_cmp(&b.1)).map(|(rate, _)| *rate);
    let figures = best.and_then(|rate| figures(rate, &at(rate)));
    let remarks = remarks(runs, &rates, best);
    Row { label: label.to_string(), figures, sweep, remarks }
}

fn figures(learning_rate: f64, runs: &[&Measured]) -> Option<Figures> {
    let spread = |value: &dyn Fn(&Measured) -> f64| {
        Spread::of(&runs.iter().map(|measured| value(measured)).collect::<Vec<f64>>())
    };
    let exact: Option<Vec<f64>> = runs.iter().map(|measured| measured.exact_match).collect();
    Some(Figures {
        learning_rate,
        loss: spread(&|m| m.loss)?,
        token_accuracy: spread(&|m| m.token_accuracy)?,
        exact_match: exact.and_then(|shares| Spread::of(&shares)),
        trainable: runs.first()?.trainable,
        file_bytes: runs.iter().map(|m| m.file_bytes).max()?,
        peak_bytes: runs.iter().filter_map(|m| m.peak_bytes).max(),
        memory: None,
        step_seconds: spread(&|m| m.step_seconds)?,
        tokens_per_second: spread(&|m| m.tokens_per_second)?,
        speed: f64::NAN,
    })
}

fn remarks(runs: &[(&Wanted, &Outcome)], rates: &[f64], best: Option<f64>) -> Vec<String> {
    let mut remarks: Vec<(String, usize)> = Vec::new();
    let mut add = |text: String| match remarks.iter_mut().find(|(known, _)| *known == text) {
        Some((_, count)) => *count += 1,
        None => remarks.push((text, 1)),
    };
    for (wanted, outcome) in runs {
        match outcome {
            Outcome::Failed(reason) => add(format!("rate {:e} failed: {reason}", wanted.rate)),
            Outcome::Missing => add(format!("rate {:e} is not run to its end", wanted.rate)),
            Outcome::Measured(_) => {}
        }
    }
    let mut remarks: Vec<String> = remarks
        .into_iter()
        .map(|(text, count)| if count == 1 { text } else { format!("{text} ({count} seeds)") })
        .collect();
    if let Some(best) = best.filter(|_| rates.len() > 1) {
        let end = |fold: fn(f64, f64) -> f64, from: f64| rates.iter().copied().fold(from, fold) == best;
        let (end, beyond) = match (end(f64::max, 0.0), end(f64::min, f64::INFINITY)) {
            (true, _) => ("highest", "higher"),
            (_, true) => ("lowest", "lower"),
            _ => return remarks,
        };
        remarks.push(format!(
            "its best rate, {best:e}, is the {end} that was tried: a {beyond} one may be better"
        ));
    }
    remarks
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::recipe::Recipe;
    use crate::report::Line;
    use serde_json::{Value, json};

    fn wanted(label: &str, rate: f64, seed: u64) -> Wanted {
        let name = format!("{label}-{rate:e}-{seed}");
        Wanted { label: label.into(), rate, name, recipe: Recipe::default(), keys: Value::Null }
    }

    fn measured(loss: f64, speed: f64) -> Outcome {
        Outcome::Measured(Measured {
            loss,
            token_accuracy: 0.5,
            exact_match: None,
            trainable: 7,
            file_bytes: 100,
            peak_bytes: Some(1000),
            step_seconds: 0.1,
            tokens_per_second: speed,
            span: None,
        })
    }

    #[test]
    fn the_rate_has_the_lowest_mean_over_all_seeds() {
        let failed = || Outcome::Failed("loss is not finite".to_string());
        let runs = [
            // The lowest single loss is at a rate whose mean is higher; the lowest mean lacks a seed.
            (wanted("a", 1e-3, 1), measured(0.9, 100.0)),
            (wanted("a", 1e-3, 2), measured(3.1, 100.0)),
            (wanted("a", 1e-2, 1), measured(1.0, 100.0)),
            (wanted("a", 1e-2, 2), measured(2.0, 140.0)),
            (wanted("a", 1e-1, 1), measured(0.1, 100.0)),
            (wanted("a", 1e-1, 2), failed()),
            (wanted("b", 1e-2, 1), failed()),
            (wanted("b", 1e-2, 2), failed()),
            (wanted("c", 1e-3, 1), measured(4.0, 60.0)),
            (wanted("c", 1e-3, 2), measured(4.0, 60.0)),
            (wanted("c", 1e-2, 1), measured(5.0, 60.0)),
            (wanted("c", 1e-2, 2), Outcome::Missing),
        ];
        let plan = Plan {
            output_dir: "o".into(),
            labels: ["a", "b", "c"].map(String::from).to_vec(),
            seeds: vec![1, 2],
            runs: runs.iter().map(|(wanted, _)| wanted.clone()).collect(),
        };
        let outcomes: Vec<Outcome> = runs.iter().map(|(_, outcome)| outcome.clone()).collect();
        let rows = rows(&plan, &outcomes);
        let a = rows[0].figures.as_ref().unwrap();
        assert_eq!((a.learning_rate, a.loss.mean, a.speed, a.memory), (1e-2, 1.5, 1.0, Some(1.0)));
        // √((0.25 + 0.25) / (2 − 1))
        assert!((a.loss.deviation.unwrap() - 0.5f64.sqrt()).abs() < 1e-12);
        assert_eq!(a.tokens_per_second.mean, 120.0);
        assert_eq!(rows[0].sweep, [(1e-3, 2.0), (1e-2, 1.5)]);
        assert_eq!(rows[0].remarks, ["rate 1e-1 failed: loss is not finite"]);
        assert!(rows[1].figures.is_none());
        assert_eq!(rows[1].remarks, ["rate 1e-2 failed: loss is not finite (2 seeds)"]);
        let c = rows[2].figures.as_ref().unwrap();
        assert_eq!((c.learning_rate, c.speed), (1e-3, 0.5));
        assert_eq!(c.loss, Spread { mean: 4.0, deviation: Some(0.0) });
        assert!(rows[2].remarks[0].contains("1e-2 is not run") && rows[2].remarks[1].contains("a lower one"));
    }

    #[test]
    fn runs_that_overlap_in_time_are_counted() {
        let ran = |begin: f64, end: f64| match measured(1.0, 1.0) {
            Outcome::Measured(run) => Outcome::Measured(Measured { span: Some((begin, end)), ..run }),
            other => other,
        };
        let missing = Outcome::Missing;
        assert_eq!(at_once(&[ran(0.0, 4.0), missing.clone(), ran(4.0, 6.0), ran(6.1, 7.0)]), 1);
        assert_eq!(at_once(&[ran(3.0, 6.0), ran(0.0, 4.0), ran(3.5, 9.0), ran(5.0, 8.0)]), 3);
        assert_eq!((at_once(&[missing]), at_once(&[measured(1.0, 1.0)])), (0, 0));
    }

    #[test]
    fn speed_leaves_the_first_step_out() {
        let line = |step, tokens, speed| Line {
            step,
            tokens: Some(tokens),
            tokens_per_second: Some(speed),
            peak_memory_bytes: Some(5.0),
            ..Line::default()
        };
        let info = json!({"trainable_parameters": 3, "result": {"peak_memory_bytes": 4,
            "after": {"eval_loss": 2.0, "eval_token_accuracy": 0.25}}});
        let steps = vec![line(1, 100.0, 1.0), line(2, 100.0, 50.0), line(3, 300.0, 100.0)];
        let run = Run { info, steps, evaluations: Vec::new(), samples: Vec::new() };
        let of = Measured::of(&run, 9).unwrap();
        // 400 tokens in 2 s and 3 s.
        assert_eq!((of.tokens_per_second, of.step_seconds), (80.0, 2.5));
        assert_eq!((of.peak_bytes, of.trainable, of.file_bytes, of.exact_match), (Some(5), 3, 9, None));
        let one = Run { steps: run.steps[..1].to_vec(), ..run.clone() };
        assert_eq!(Measured::of(&one, 9).unwrap().step_seconds, 100.0);
        let diverged = Run { info: json!({"result": {"after": {"eval_loss": null}}}), ..run };
        assert!(Measured::of(&diverged, 9).unwrap_err().contains("not finite"));
    }
}
