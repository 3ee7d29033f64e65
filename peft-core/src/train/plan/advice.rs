//! What to change so that a run fits, mildest first.

use super::{BatchShape, GradientCheckpointing, Workload, predict};
use serde::Serialize;
use std::collections::BTreeSet;

/// Changes of a recipe that together bring its peak under a limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Advice {
    /// Keys of the recipe with their new values.
    pub changes: Vec<(&'static str, String)>,
    /// What they cost.
    pub cost: String,
    /// The peak then, in bytes.
    pub peak_bytes: u64,
}

/// The recipe's keys that decide how much passes through the model at a time.
#[derive(Debug, Clone, Copy)]
pub struct Batching {
    /// Examples a micro-batch.
    pub micro_batch_size: usize,
    /// Micro-batches a step.
    pub gradient_accumulation_steps: usize,
    /// Examples a batch in evaluation.
    pub eval_batch_size: usize,
    /// Longest example in tokens.
    pub sequence_len: usize,
}

/// The fastest way to run a step whose peak leaves a tenth of `limit` bytes free; the one of least memory where none does
/// or the limit is not known.
pub fn fastest_that_fits(work: &Workload, limit: Option<u64>) -> GradientCheckpointing {
    let fits = |mode: &GradientCheckpointing| {
        let mut changed = work.clone();
        changed.step.gradient_checkpointing = *mode;
        limit.is_some_and(|limit| predict(&changed).peak_bytes <= limit - limit / 10)
    };
    [GradientCheckpointing::Off, GradientCheckpointing::Selective]
        .into_iter()
        .find(fits)
        .unwrap_or(GradientCheckpointing::Layers)
}

/// Ways to bring the run under `limit` bytes: every single change that does, else the first few that do together.
/// Empty where nothing does.
pub fn advise(work: &Workload, batching: Batching, limit: u64) -> Vec<Advice> {
    let ladders =
        [checkpointing(work), smaller_evaluation(batching), smaller_batches(batching), shorter(batching)];
    let fits = |steps: &[&Step]| {
        let mut changed = work.clone();
        steps.iter().for_each(|step| (step.apply)(&mut changed));
        let peak_bytes = predict(&changed).peak_bytes;
        (peak_bytes <= limit).then(|| Advice {
            changes: steps.iter().flat_map(|step| step.changes.clone()).collect(),
            cost: steps.iter().map(|step| step.cost).collect::<Vec<_>>().join("; "),
            peak_bytes,
        })
    };
    let alone: Vec<Advice> =
        ladders.iter().filter_map(|rungs| rungs.iter().find_map(|rung| fits(&[rung]))).collect();
    if !alone.is_empty() {
        return alone;
    }
    // Every ladder to its end before the next is begun, which costs more.
    let mut taken: Vec<&Step> = Vec::new();
    for rungs in &ladders {
        for rung in rungs {
            let together: Vec<&Step> = taken.iter().copied().chain([rung]).collect();
            if let Some(advice) = fits(&together) {
                return vec![advice];
            }
        }
        taken.extend(rungs.last());
    }
    Vec::new()
}

/// One change, and what it does to the workload.
struct Step {
    changes: Vec<(&'static str, String)>,
    cost: &'static str,
    apply: Box<dyn Fn(&mut Workload)>,
}

fn checkpointing(work: &Workload) -> Vec<Step> {
    let step = |mode: GradientCheckpointing, value: &str, cost| Step {
        changes: vec![("gradient_checkpointing", value.to_string())],
        cost,
        apply: Box::new(move |work: &mut Workload| work.step.gradient_checkpointing = mode),
    };
    let rungs = [
        step(GradientCheckpointing::Selective, "selective", "a little time"),
        step(GradientCheckpointing::Layers, "true", "a third more time"),
    ];
    let passed = match work.step.gradient_checkpointing {
        GradientCheckpointing::Off => 0,
        GradientCheckpointing::Selective => 1,
        GradientCheckpointing::Layers => 2,
    };
    rungs.into_iter().skip(passed).collect()
}

/// Halves of `n` down to `least`.
fn halves(n: usize, least: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(n / 2), |n| Some(n / 2)).take_while(move |n| *n >= least)
}

fn smaller_evaluation(batching: Batching) -> Vec<Step> {
    let old = batching.eval_batch_size;
    let step = |new: usize| Step {
        changes: vec![("eval_batch_size", new.to_string())],
        cost: "a little time in evaluation",
        apply: Box::new(move |work| {
            work.evaluation = with_rows(&work.evaluation, old, new);
            work.generated_rows = work.generated_rows.min(new);
        }),
    };
    halves(old, 1).map(step).collect()
}

fn smaller_batches(batching: Batching) -> Vec<Step> {
    let old = batching.micro_batch_size;
    let step = |new: usize| {
        let accumulation = (old * batching.gradient_accumulation_steps).div_ceil(new);
        Step {
            changes: vec![
                ("micro_batch_size", new.to_string()),
                ("gradient_accumulation_steps", accumulation.to_string()),
            ],
            cost: "some speed, the same steps",
            apply: Box::new(move |work| {
                work.accumulation = accumulation;
                work.batches = with_rows(&work.batches, old, new);
            }),
        }
    };
    halves(old, 1).map(step).collect()
}

fn shorter(batching: Batching) -> Vec<Step> {
    let step = |new: usize| Step {
        changes: vec![("sequence_len", new.to_string())],
        cost: "longer examples are cut, dropped or split as on_truncation says",
        apply: Box::new(move |work| {
            work.batches = with_time(&work.batches, new);
            work.evaluation = with_time(&work.evaluation, new);
        }),
    };
    halves(batching.sequence_len, 64).map(step).collect()
}

/// Batches of `new` rows instead of `old`, as long as before.
fn with_rows(batches: &BTreeSet<BatchShape>, old: usize, new: usize) -> BTreeSet<BatchShape> {
    let scaled = |n: usize| (n * new).div_ceil(old);
    let shape = |b: &BatchShape| BatchShape {
        rows: scaled(b.rows),
        time: b.time,
        supervised: scaled(b.supervised),
        pairs: (b.pairs * new as u64).div_ceil(old as u64),
    };
    batches.iter().map(shape).collect()
}

/// Batches of at most `time` columns.
fn with_time(batches: &BTreeSet<BatchShape>, time: usize) -> BTreeSet<BatchShape> {
    let shape = |b: &BatchShape| {
        let supervised = if b.time > time { (b.supervised * time).div_ceil(b.time) } else { b.supervised };
        let time = b.time.min(time);
        BatchShape { time, supervised, pairs: b.pairs.min((b.rows * time * time) as u64), ..*b }
    };
    batches.iter().map(shape).collect()
}
