//! A few real steps, to learn what a token costs on this machine.

use super::{BatchShape, RunBatches};
use crate::data::{Example, Rows, collate, collate_packs};
use crate::model::Decoder;
use crate::projection::DropoutKey;
use crate::train::{
    ParameterOptimizer, StepGradients, TrainConfig, accumulate, evaluate, peak_memory_bytes, ready_memory,
    update_parameters,
};
use serde::Serialize;
use std::time::Instant;

/// What was measured.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Calibration {
    /// Forward and backward of a token, padding included.
    pub seconds_per_token: f64,
    /// One update of all parameters.
    pub seconds_per_update: f64,
    /// Evaluation of a token, padding included; 0 without validation data.
    pub seconds_per_evaluated_token: f64,
    /// Peak memory, with the run's largest micro-batch among the measured.
    pub peak_memory_bytes: Option<u64>,
}

impl Calibration {
    /// Seconds of a run of `steps` steps over these batches, with `evaluations` of `evaluation_tokens` tokens.
    pub fn seconds(&self, batches: &RunBatches, steps: u64, evaluations: u64, evaluation_tokens: u64) -> f64 {
        batches.padded_tokens as f64 * self.seconds_per_token
            + steps as f64 * self.seconds_per_update
            + (evaluations * evaluation_tokens) as f64 * self.seconds_per_evaluated_token
    }
}

/// Runs steps on the first epoch's largest micro-batch and on two of middling size, and one evaluation of a batch.
/// The model's parameters are changed by the updates.
pub fn calibrate(
    model: &mut Decoder,
    optimizer: &mut dyn ParameterOptimizer,
    config: &TrainConfig,
    train: &[Example],
    validation: &[Example],
) -> Calibration {
    ready_memory(model);
    let epoch = config.epochs(train).at(0);
    let shape = |rows: &Rows| BatchShape::of_rows(config, rows, train);
    let mut order: Vec<Rows> = epoch.steps.into_iter().flatten().collect();
    order.sort_by_key(|rows| shape(rows).tokens());
    let middle = order.len() / 2;
    let chosen = [middle, order.len().saturating_sub(1), middle, middle.saturating_sub(1)];

    let (mut tokens, mut seconds, mut updates) = (0, 0.0, Vec::new());
    for (step, micro_batch) in chosen.into_iter().filter_map(|index| order.get(index)).enumerate() {
        let rows: Vec<Vec<&Example>> =
            micro_batch.iter().map(|row| row.iter().map(|index| &train[*index]).collect()).collect();
        let batch = match config.pack_tokens {
            Some(_) => collate_packs(&rows, 0),
            None => collate(&rows.concat(), 0),
        };
        let key = DropoutKey { seed: config.seed, step: step as u64, micro_batch: 0 };
        let mut sums = StepGradients::default();
        let start = Instant::now();
        accumulate(model, &batch, 1.0 / batch.targets.len().max(1) as f64, key, config.step, &mut sums);
        sums.losses();
        let forward_and_backward = start.elapsed().as_secs_f64();
        let start = Instant::now();
        model.pull_back(&mut sums.gradients);
        update_parameters(model, optimizer, sums.gradients, None, |_| 0.0);
        // The first step warms up.
        if step > 0 {
            tokens += shape(micro_batch).tokens();
            seconds += forward_and_backward;
            updates.push(start.elapsed().as_secs_f64());
        }
    }
    let held_out: Vec<Example> = validation.iter().take(config.eval_batch_size).cloned().collect();
    let start = Instant::now();
    let evaluated = BatchShape::of(held_out.iter()).tokens();
    if evaluated > 0 {
        evaluate(model, &held_out, config.eval_batch_size, config.step.loss_chunk_rows, || true);
    }
    Calibration {
        seconds_per_token: seconds / (tokens.max(1)) as f64,
        seconds_per_update: updates.iter().sum::<f64>() / updates.len().max(1) as f64,
        seconds_per_evaluated_token: start.elapsed().as_secs_f64() / evaluated.max(1) as f64,
        peak_memory_bytes: peak_memory_bytes(&model.device),
    }
}
