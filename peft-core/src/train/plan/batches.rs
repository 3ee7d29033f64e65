//! The shapes of the batches that a run will see.

use crate::data::{Epochs, Example, Rows};
use crate::kernels::group_segments;
use crate::train::TrainConfig;
use serde::Serialize;
use std::collections::BTreeSet;

/// Size of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct BatchShape {
    /// Rows.
    pub rows: usize,
    /// Tokens a row, padding included.
    pub time: usize,
    /// Supervised tokens.
    pub supervised: usize,
    /// Pairs of a query and a key for which each head has a score, hidden ones among them.
    pub pairs: u64,
}

impl BatchShape {
    /// `rows` padded sequences of `time` tokens.
    pub fn padded(rows: usize, time: usize, supervised: usize) -> Self {
        Self { rows, time, supervised, pairs: (rows * time) as u64 * time as u64 }
    }

    /// The batch of these examples, a row each.
    pub fn of<'a>(examples: impl Iterator<Item = &'a Example>) -> Self {
        let (mut rows, mut time, mut supervised) = (0, 0, 0);
        for example in examples {
            rows += 1;
            time = time.max(example.ids.len());
            supervised += example.supervised_tokens();
        }
        Self::padded(rows, time, supervised)
    }

    /// The batch of these rows, each of several examples that do not see one another.
    fn packed(rows: &[Vec<&Example>]) -> Self {
        let length = |row: &[&Example]| row.iter().map(|example| example.ids.len()).sum::<usize>();
        let mut segments = Vec::new();
        let mut tokens = 0;
        for example in rows.iter().flatten() {
            segments.push(tokens..tokens + example.ids.len());
            tokens += example.ids.len();
        }
        let (groups, _) = group_segments(&segments, tokens);
        Self {
            rows: rows.len(),
            time: rows.iter().map(|row| length(row)).max().unwrap_or(0),
            supervised: rows.iter().flatten().map(|example| example.supervised_tokens()).sum(),
            pairs: groups.iter().map(|group| (group.lengths.len() * group.time * group.time) as u64).sum(),
        }
    }

    /// The micro-batch of these rows of a run.
    pub(super) fn of_rows(config: &TrainConfig, rows: &Rows, examples: &[Example]) -> Self {
        let rows: Vec<Vec<&Example>> =
            rows.iter().map(|row| row.iter().map(|index| &examples[*index]).collect()).collect();
        match config.pack_tokens {
            Some(_) => Self::packed(&rows),
            None => Self::of(rows.into_iter().flatten()),
        }
    }

    /// Tokens, padding included.
    pub fn tokens(&self) -> u64 {
        (self.rows * self.time) as u64
    }
}

/// The micro-batches of a run, epoch after epoch, as far as memory and time depend on them.
#[derive(Debug, Clone, Default)]
pub struct RunBatches {
    /// The different shapes.
    pub shapes: BTreeSet<BatchShape>,
    /// Tokens over all steps, padding included.
    pub padded_tokens: u64,
    /// Tokens over all steps.
    pub tokens: u64,
}

impl RunBatches {
    /// The micro-batches of `steps` steps over `examples`, in the order of the run.
    pub fn of_run(config: &TrainConfig, epochs: &Epochs, examples: &[Example], steps: u64) -> Self {
        let mut batches = Self::default();
        if examples.is_empty() {
            return batches;
        }
        let mut epoch = epochs.at(0);
        loop {
            let left = usize::try_from(steps.saturating_sub(epoch.first_step)).unwrap_or(usize::MAX);
            for rows in epoch.steps.iter().take(left).flatten() {
                let shape = BatchShape::of_rows(config, rows, examples);
                batches.padded_tokens += shape.tokens();
                batches.tokens +=
                    rows.iter().flatten().map(|index| epochs.lengths[*index] as u64).sum::<u64>();
                batches.shapes.insert(shape);
            }
            if left <= epoch.steps.len() {
                return batches;
            }
            epoch = epochs.next(&epoch);
        }
    }
}

/// The batches of an evaluation, longest first.
pub fn evaluation_batches(examples: &[Example], batch_size: usize) -> BTreeSet<BatchShape> {
    let mut order: Vec<&Example> = examples.iter().collect();
    order.sort_by_key(|example| std::cmp::Reverse(example.ids.len()));
    order.chunks(batch_size.max(1)).map(|chunk| BatchShape::of(chunk.iter().copied())).collect()
}
