//! LoRA-SB's factors from the gradients of the base on samples of the data, layer by layer.

use super::error::CoreInitError;
use super::factors::{CoreFactors, lora_sb};
use peft_core::data::{Example, collate};
use peft_core::linalg::{LinalgError, Matrix, Sketch};
use peft_core::model::Decoder;
use peft_core::random::Stream;
use peft_core::train::{MicroBatch, StepSettings, layer_gradients};
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// How the first step is estimated.
#[derive(Debug, Clone, Copy)]
pub struct Estimate {
    /// `η`, the rate of the step.
    pub eta: f64,
    /// `s`.
    pub scale: f64,
    /// The decomposition.
    pub sketch: Sketch,
    /// Seed of the decomposition's random vectors.
    pub seed: u64,
    /// Examples a micro-batch.
    pub batch_size: usize,
}

/// The factors of the modules `paths` by path. The gradient of a weight is the sum over the micro-batches of that of the
/// mean loss over supervised tokens, divided by the micro-batch's examples.
///
/// No more gradients than one layer's are held at a time, beside the factors already made.
///
/// # Errors
/// A gradient that is zero or not finite, and those of [`lora_sb`].
pub fn estimate(
    model: &mut Decoder,
    paths: &[String],
    samples: &[&Example],
    how: Estimate,
    step: StepSettings,
) -> Result<BTreeMap<String, CoreFactors>, CoreInitError> {
    let batches: Vec<(MicroBatch, f64)> = samples
        .chunks(how.batch_size.max(1))
        .map(|examples| {
            let batch = collate(examples, 0);
            let factor = 1.0 / (batch.targets.len().max(1) * examples.len()) as f64;
            (batch, factor)
        })
        .collect();
    let names: BTreeSet<String> = paths.iter().map(|path| format!("{path}.weight")).collect();
    let mut factors = BTreeMap::new();
    layer_gradients(model, &names, &batches, step, |gradients| {
        let host: Vec<(String, [usize; 2], Vec<f32>)> = gradients
            .into_iter()
            .map(|(name, gradient)| {
                let path = name.trim_end_matches(".weight").to_string();
                (path, gradient.dims(), gradient.into_data().iter::<f32>().collect())
            })
            .collect();
        let of_layer: Result<Vec<_>, CoreInitError> = host
            .into_par_iter()
            .map(|(path, dims, gradient)| {
                let gradient = matrix(&path, &gradient, dims, samples.len())?;
                let mut stream = Stream::new(how.seed, "lora_sb sketch", &path, &[]);
                let factors = lora_sb(&path, &gradient, how.eta, how.scale, how.sketch, &mut stream)?;
                Ok((path, factors))
            })
            .collect();
        factors.extend(of_layer?);
        Ok(())
    })?;
    match paths.iter().find(|path| !factors.contains_key(*path)) {
        None => Ok(factors),
        // The loss does not depend on the weight at all.
        Some(path) => Err(CoreInitError::ZeroGradient { module: path.clone(), samples: samples.len() }),
    }
}

/// The gradient as a matrix, if it says which way to go.
fn matrix(path: &str, gradient: &[f32], dims: [usize; 2], samples: usize) -> Result<Matrix, CoreInitError> {
    let module = path.to_string();
    if gradient.iter().all(|value| *value == 0.0) {
        return Err(CoreInitError::ZeroGradient { module, samples });
    }
    match Matrix::from_rows(gradient, dims) {
        Err(LinalgError::NonFinite { .. }) => Err(CoreInitError::NonFiniteGradient { module, samples }),
        Err(source) => Err(CoreInitError::Decomposition { module, source }),
        Ok(matrix) => Ok(matrix),
    }
}
