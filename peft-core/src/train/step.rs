//! Forward and backward of one micro-batch, layer by layer or over the whole graph.
//!
//! The layers are cut into segments: one layer each, or all in one. Forward keeps each segment's input; backward runs
//! a segment again from a fresh leaf and pushes the gradient through with `(y ∘ ∂ℓ/∂y).sum().backward()`. The last
//! segment is recorded on the way forward already, so the whole graph is the case of one segment and nothing of it is
//! computed twice. Peak memory is one segment's activations, however deep the model.

use super::loss::head_loss;
use crate::data::Batch;
use crate::model::{Context, Decoder};
use crate::projection::{DropoutKey, Tape};
use burn::tensor::{IndexingUpdateOp, Tensor};
use std::collections::BTreeMap;
use std::ops::Range;

/// A padded or packed batch of examples.
pub type MicroBatch = Batch;

/// How a step runs.
#[derive(Debug, Clone, Copy)]
pub struct StepSettings {
    /// Recompute layer by layer in the backward instead of keeping the whole graph.
    pub gradient_checkpointing: bool,
    /// Rows of logits held at a time; `None` chooses by the vocabulary's size.
    pub loss_chunk_rows: Option<usize>,
}

/// Gradients of parameters by name, handed over as soon as they exist: head, final norm, then the segments from the last
/// to the first, then the embedding. A name comes more than once where its parameter is used more than once; the
/// gradient is the sum.
pub type GradientSink<'a> = &'a mut dyn FnMut(BTreeMap<String, Tensor<2>>);

/// The loss of one micro-batch.
#[derive(Debug, Clone, Copy)]
pub struct MicroBatchLoss {
    /// Sum of the losses in nats.
    pub loss_sum: f64,
    /// Targets predicted correctly.
    pub correct: u64,
}

/// What accumulates over the micro-batches of a step.
#[derive(Default)]
pub struct StepGradients {
    /// By parameter name: the gradient of the step's mean loss.
    pub gradients: BTreeMap<String, Tensor<2>>,
    /// Sum of the losses in nats.
    pub loss_sum: f64,
    /// Targets predicted correctly.
    pub correct: u64,
}

/// Adds gradients by name.
pub(super) fn add_gradients(into: &mut BTreeMap<String, Tensor<2>>, from: BTreeMap<String, Tensor<2>>) {
    for (name, gradient) in from {
        let sum = match into.remove(&name) {
            Some(sum) => sum + gradient,
            None => gradient,
        };
        into.insert(name, sum);
    }
}

/// Adds loss and gradients of one micro-batch to `step`. `scale` is one over the supervised tokens of the whole
/// accumulation window, so that the sum over its micro-batches is the gradient of their mean loss.
pub fn accumulate(
    model: &Decoder,
    batch: &MicroBatch,
    scale: f64,
    key: DropoutKey,
    settings: StepSettings,
    step: &mut StepGradients,
) {
    let StepGradients { gradients, loss_sum, correct } = step;
    let loss = backward(model, batch, scale, key, settings, &mut |new| add_gradients(gradients, new));
    *loss_sum += loss.loss_sum;
    *correct += loss.correct;
}

/// Forward and backward of one micro-batch as [`accumulate`] runs it, with the gradients given to `sink` instead of
/// being kept: with `gradient_checkpointing`, gradients of no more than one layer are held at a time.
pub fn backward(
    model: &Decoder,
    batch: &MicroBatch,
    scale: f64,
    key: DropoutKey,
    settings: StepSettings,
    sink: GradientSink,
) -> MicroBatchLoss {
    let context = model.batch_context(batch);
    let untracked = Tape::untracked(key);
    let segments = segments(model.layers().len(), settings.gradient_checkpointing);
    let trains: Vec<bool> = segments
        .iter()
        .map(|range| model.layers()[range.clone()].iter().any(|layer| layer.is_trainable()))
        .collect();
    // Whether a gradient must leave the segment at its lower end.
    let below: Vec<bool> =
        (0..segments.len()).map(|i| model.trains_embedding() || trains[..i].contains(&true)).collect();
    let last = segments.len() - 1;

    let ids = model.ids(&batch.ids);
    let mut x = model.embed(&untracked, ids.clone());
    let mut inputs = Vec::with_capacity(last);
    for segment in &segments[..last] {
        inputs.push(x.clone());
        x = run(model, segment, &untracked, x, &context);
    }
    let recorded = record(model, &segments[last], x, below[last], key, &context);

    let rows = model.ids(&batch.positions);
    let targets = model.ids(&batch.targets);
    let output = recorded.output.clone().inner();
    let norm_tape = Tape::recording(key);
    let leaf = output.clone().select(0, rows.clone()).autodiff().require_grad();
    let normed = model.final_norm(&norm_tape, leaf.clone());
    let mut head_gradients = BTreeMap::new();
    let loss = head_loss(
        model,
        normed.clone().inner(),
        targets,
        settings.loss_chunk_rows,
        Some((scale, key)),
        &mut head_gradients,
    );
    let micro_batch = MicroBatchLoss {
        loss_sum: f64::from(loss.loss_sum.into_scalar::<f32>()),
        correct: loss.correct.into_scalar::<i64>() as u64,
    };
    let Some(gradient) = loss.gradient else { return micro_batch };
    sink(head_gradients);

    let mut grads = (normed * gradient).sum().backward();
    let row_gradient = leaf.grad_remove(&mut grads);
    sink(norm_tape.gradients(&mut grads));
    let Some(row_gradient) = row_gradient else { return micro_batch };
    let mut dy = output.zeros_like().select_assign(0, rows, row_gradient, IndexingUpdateOp::Add);

    let mut recorded = Some(recorded);
    for index in (0..segments.len()).rev() {
        let again = || inputs.pop().map(|x| record(model, &segments[index], x, below[index], key, &context));
        let Some(Recorded { output, leaf, tape }) = recorded.take().or_else(again) else {
            return micro_batch;
        };
        if !output.is_tracked() {
            return micro_batch;
        }
        let mut grads = (output * dy).sum().backward();
        sink(tape.gradients(&mut grads));
        match leaf.grad_remove(&mut grads) {
            Some(dx) => dy = dx,
            None => return micro_batch,
        }
    }

    if model.trains_embedding() {
        let tape = Tape::recording(key);
        let mut grads = (model.embed(&tape, ids) * dy).sum().backward();
        sink(tape.gradients(&mut grads));
    }
    micro_batch
}

fn segments(layers: usize, checkpointing: bool) -> Vec<Range<usize>> {
    match checkpointing {
        true => (0..layers).map(|layer| layer..layer + 1).collect(),
        false => std::iter::once(0..layers).collect(),
    }
}

/// A segment's forward with its graph.
struct Recorded {
    output: Tensor<2>,
    leaf: Tensor<2>,
    tape: Tape<'static>,
}

fn record(
    model: &Decoder,
    segment: &Range<usize>,
    input: Tensor<2>,
    needs_input_gradient: bool,
    key: DropoutKey,
    context: &Context,
) -> Recorded {
    let tape = Tape::recording(key);
    let leaf = input.autodiff();
    let leaf = if needs_input_gradient { leaf.require_grad() } else { leaf };
    let output = run(model, segment, &tape, leaf.clone(), context);
    Recorded { output, leaf, tape }
}

fn run(model: &Decoder, segment: &Range<usize>, tape: &Tape, x: Tensor<2>, context: &Context) -> Tensor<2> {
    model.layers()[segment.clone()].iter().fold(x, |x, layer| layer.forward(tape, x, context, None))
}

/// The 2-norm over all gradients together.
pub fn global_norm(gradients: &BTreeMap<String, Tensor<2>>) -> f64 {
    let squares: Vec<Tensor<1>> =
        gradients.values().map(|gradient| gradient.clone().square().sum()).collect();
    if squares.is_empty() {
        return 0.0;
    }
    f64::from(Tensor::cat(squares, 0).sum().into_scalar::<f32>()).sqrt()
}
