//! Gradients of whole weights, summed over several batches and handed out one layer at a time.
//!
//! A backward over one batch visits every layer, so that sums over batches made of such backwards hold the gradients of all
//! layers. Here the loops are turned round: the gradients of one layer are summed over all batches before those of the layer
//! below come into being. What is held in exchange are hidden states: the inputs of every `⌈√layers⌉`-th layer, and those of
//! the layers between two of these while their turn is; for them the forward runs a second time.

use super::step::{MicroBatch, Recorded, StepSettings, add_gradients, head_backward, record};
use crate::kernels::{as_dtype, backward_from};
use crate::model::{Context, Decoder};
use crate::projection::{DropoutKey, Tape};
use burn::tensor::{DType, Tensor};
use std::collections::{BTreeMap, BTreeSet};

/// Nothing has dropout while gradients of a base are taken.
const KEY: DropoutKey = DropoutKey { seed: 0, step: 0, micro_batch: 0 };

/// Hands the gradients of the parameters `wanted`, in f32, to `sink`: those of the head first, then layer after layer from
/// the last to the first. A parameter's gradient is that of the sum over `batches` of each one's factor times the sum of the
/// losses over its supervised tokens.
///
/// The parameters keep their types, and what trains in the model is afterwards what it was. A parameter that the loss does
/// not depend on is not handed out.
///
/// # Errors
/// That of `sink`, which ends the work.
pub fn layer_gradients<E>(
    model: &mut Decoder,
    wanted: &BTreeSet<String>,
    batches: &[(MicroBatch, f64)],
    settings: StepSettings,
    sink: impl FnMut(BTreeMap<String, Tensor<2>>) -> Result<(), E>,
) -> Result<(), E> {
    let before: Vec<bool> = model.parameters().iter().map(|parameter| parameter.trainable).collect();
    for parameter in model.parameters_mut() {
        parameter.trainable = wanted.contains(&parameter.name);
    }
    let result = of_trainable(model, batches, settings, sink);
    for (parameter, trainable) in model.parameters_mut().into_iter().zip(before) {
        parameter.trainable = trainable;
    }
    result
}

/// A batch on its way back through the layers.
struct Pass {
    context: Context,
    /// Inputs of the layers `0, stride, 2·stride, …` below the one in work.
    kept: Vec<Tensor<2>>,
    /// Gradient of the loss at the output of the layer in work, `[tokens, hidden]`.
    gradient: Tensor<2>,
}

fn of_trainable<E>(
    model: &Decoder,
    batches: &[(MicroBatch, f64)],
    settings: StepSettings,
    mut sink: impl FnMut(BTreeMap<String, Tensor<2>>) -> Result<(), E>,
) -> Result<(), E> {
    let layers = model.layers();
    let stride = (layers.len() as f64).sqrt().ceil() as usize;
    let untracked = Tape::untracked(KEY);
    let mut sums = BTreeMap::new();
    let mut passes = Vec::with_capacity(batches.len());
    for (batch, factor) in batches.iter().filter(|(batch, _)| !batch.targets.is_empty()) {
        let context = model.batch_context(batch);
        let mut x = model.embed(&untracked, model.ids(&batch.ids));
        let mut kept = Vec::new();
        for (index, layer) in layers.iter().enumerate() {
            if index.is_multiple_of(stride) {
                kept.push(x.clone());
            }
            x = layer.forward(&untracked, x, &context, None);
        }
        let mut of_head = |gradients| add_gradients(&mut sums, in_f32(gradients));
        let (_, gradient) = head_backward(model, batch, x, *factor, KEY, settings, &mut of_head);
        passes.extend(gradient.map(|gradient| Pass { context, kept, gradient }));
    }
    if !sums.is_empty() {
        sink(sums)?;
    }

    let Some(first) = layers.iter().position(|layer| layer.is_trainable()) else { return Ok(()) };
    let stretches = (0..layers.len()).step_by(stride).map(|start| start..(start + stride).min(layers.len()));
    for stretch in stretches.rev().filter(|stretch| stretch.end > first) {
        // Inputs of the stretch's layers, by batch.
        let mut inputs: Vec<Vec<Tensor<2>>> = Vec::with_capacity(passes.len());
        for pass in &mut passes {
            let mut of_batch = Vec::with_capacity(stretch.len());
            of_batch.extend(pass.kept.pop());
            for layer in &layers[stretch.start..stretch.end - 1] {
                let input = of_batch.last().cloned();
                of_batch.extend(input.map(|x| layer.forward(&untracked, x, &pass.context, None)));
            }
            inputs.push(of_batch);
        }
        for index in stretch.rev().take_while(|index| *index >= first) {
            let mut sums = BTreeMap::new();
            for (pass, inputs) in passes.iter_mut().zip(&mut inputs) {
                let Some(input) = inputs.pop() else { continue };
                let segment = index..index + 1;
                let tape = Tape::recording(KEY);
                let recorded = record(model, &segment, tape, input, index > first, &pass.context);
                let Recorded { output, leaf, tape } = recorded;
                if !output.is_tracked() {
                    continue;
                }
                let mut grads = backward_from(output, pass.gradient.clone());
                add_gradients(&mut sums, in_f32(tape.gradients(&mut grads)));
                if let Some(gradient) = leaf.grad_remove(&mut grads) {
                    pass.gradient = gradient;
                }
            }
            if !sums.is_empty() {
                sink(sums)?;
            }
        }
    }
    Ok(())
}

fn in_f32(gradients: BTreeMap<String, Tensor<2>>) -> BTreeMap<String, Tensor<2>> {
    gradients.into_iter().map(|(name, gradient)| (name, as_dtype(gradient, DType::F32))).collect()
}
