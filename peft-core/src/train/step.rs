//! Forward and backward of one micro-batch, layer by layer or over the whole graph.
//!
//! The layers are cut into segments: one layer each, or all in one. Forward keeps each segment's input; backward runs
//! a segment again from a fresh leaf and pushes the gradient through with `(y ∘ ∂ℓ/∂y).sum().backward()`. The last
//! segment is recorded on the way forward already, so the whole graph is the case of one segment and nothing of it is
//! computed twice. Peak memory is one segment's activations, however deep the model.

use super::loss::{HeadLoss, head_loss};
use crate::data::Batch;
use crate::kernels::{backward_from, sum_of_squares};
use crate::model::{Context, Decoder};
use crate::projection::{DropoutKey, Tape};
use burn::tensor::{Int, Tensor};
use std::collections::BTreeMap;
use std::ops::Range;

/// A padded or packed batch of examples.
pub type MicroBatch = Batch;

/// What the backward computes again instead of finding it kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum GradientCheckpointing {
    /// Nothing: the fastest, with the most memory.
    Off,
    /// Norms and gates, which cost little.
    Selective,
    /// Whole layers, one at a time: the least memory.
    Layers,
}

/// How a step runs.
#[derive(Debug, Clone, Copy)]
pub struct StepSettings {
    /// What is computed twice.
    pub gradient_checkpointing: GradientCheckpointing,
    /// Rows of logits held at a time; `None` chooses by the vocabulary's size.
    pub loss_chunk_rows: Option<usize>,
}

/// Gradients of parameters by name, handed over as soon as they exist: head, final norm, then the segments from the last
/// to the first, then the embedding. A name comes more than once where its parameter is used more than once; the
/// gradient is the sum.
pub type GradientSink<'a> = &'a mut dyn FnMut(BTreeMap<String, Tensor<2>>);

/// The loss of one micro-batch, perhaps still to be computed by the device: reading it waits for the whole backward.
#[derive(Debug, Clone)]
pub struct MicroBatchLoss {
    /// Sum of the losses in nats, `[1]`.
    pub loss_sum: Tensor<1>,
    /// Targets predicted correctly, `[1]`.
    pub correct: Tensor<1, Int>,
}

/// What accumulates over the micro-batches of a step.
#[derive(Default)]
pub struct StepGradients {
    /// By parameter name: the gradient of the step's mean loss.
    pub gradients: BTreeMap<String, Tensor<2>>,
    loss_sum: f64,
    correct: u64,
    /// Losses that were not read yet.
    unread: Vec<MicroBatchLoss>,
}

impl StepGradients {
    /// Of a step in progress.
    pub fn resumed(gradients: BTreeMap<String, Tensor<2>>, loss_sum: f64, correct: u64) -> Self {
        Self { gradients, loss_sum, correct, unread: Vec::new() }
    }

    /// Adds a micro-batch's loss.
    pub fn add_loss(&mut self, loss: MicroBatchLoss) {
        self.unread.push(loss);
    }

    /// The sum of the losses in nats and how many targets were predicted correctly. Waits for the device.
    pub fn losses(&mut self) -> (f64, u64) {
        for MicroBatchLoss { loss_sum, correct } in self.unread.drain(..) {
            self.loss_sum += f64::from(loss_sum.into_scalar::<f32>());
            self.correct += correct.into_scalar::<i64>() as u64;
        }
        (self.loss_sum, self.correct)
    }

    /// The sum of the squares of all gradients, `[1]`; not finite where a loss is not.
    pub fn sum_of_squares(&self) -> Option<Tensor<1>> {
        let squares = sum_of_squares(self.gradients.values().cloned().collect())?;
        Some(self.unread.iter().fold(squares, |sum, loss| sum + loss.loss_sum.clone().mul_scalar(0.0)))
    }
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
    let gradients = &mut step.gradients;
    let loss = backward(model, batch, scale, key, settings, &mut |new| add_gradients(gradients, new));
    step.add_loss(loss);
}

/// Forward and backward of one micro-batch as [`accumulate`] runs it, with the gradients given to `sink` instead of
/// being kept: with [`GradientCheckpointing::Layers`], gradients of no more than one layer are held at a time.
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
    let recompute = settings.gradient_checkpointing == GradientCheckpointing::Selective;
    let record = |segment: &Range<usize>, input, needs_input_gradient| {
        let tape = Tape::recording(key).recomputing(recompute);
        record(model, segment, tape, input, needs_input_gradient, &context)
    };
    let recorded = record(&segments[last], x, below[last]);

    let (loss, dy) = head_backward(model, batch, recorded.output.clone().inner(), scale, key, settings, sink);
    let micro_batch = MicroBatchLoss { loss_sum: loss.loss_sum, correct: loss.correct };
    let Some(mut dy) = dy else { return micro_batch };

    let mut recorded = Some(recorded);
    for index in (0..segments.len()).rev() {
        let again = || inputs.pop().map(|x| record(&segments[index], x, below[index]));
        let Some(Recorded { output, leaf, tape }) = recorded.take().or_else(again) else {
            return micro_batch;
        };
        if !output.is_tracked() {
            return micro_batch;
        }
        let mut grads = backward_from(output, dy);
        sink(tape.gradients(&mut grads));
        match leaf.grad_remove(&mut grads) {
            Some(dx) => dy = dx,
            None => return micro_batch,
        }
    }

    if model.trains_embedding() {
        let tape = Tape::recording(key);
        let mut grads = backward_from(model.embed(&tape, ids), dy);
        sink(tape.gradients(&mut grads));
    }
    micro_batch
}

/// The loss of a micro-batch from the last layer's `output` `[tokens, hidden]`, and the gradient of `scale · loss` there;
/// gradients of head and final norm go to `sink`.
pub(super) fn head_backward(
    model: &Decoder,
    batch: &MicroBatch,
    output: Tensor<2>,
    scale: f64,
    key: DropoutKey,
    settings: StepSettings,
    sink: GradientSink,
) -> (HeadLoss, Option<Tensor<2>>) {
    let rows = model.ids(&batch.positions);
    let targets = model.ids(&batch.targets);
    let norm_tape = Tape::recording(key);
    let leaf = output.select(0, rows).autodiff().require_grad();
    let normed = model.final_norm(&norm_tape, leaf.clone());
    let mut head_gradients = BTreeMap::new();
    let mut loss = head_loss(
        model,
        normed.clone().inner(),
        targets,
        settings.loss_chunk_rows,
        Some((scale, key)),
        &mut head_gradients,
    );
    let Some(gradient) = loss.gradient.take() else { return (loss, None) };
    sink(head_gradients);
    let mut grads = backward_from(normed, gradient);
    let row_gradient = leaf.grad_remove(&mut grads);
    sink(norm_tape.gradients(&mut grads));
    let dy = row_gradient.map(|rows| spread(rows, &batch.positions, batch.ids.len(), model));
    (loss, dy)
}

fn segments(layers: usize, checkpointing: GradientCheckpointing) -> Vec<Range<usize>> {
    match checkpointing {
        GradientCheckpointing::Layers => (0..layers).map(|layer| layer..layer + 1).collect(),
        _ => std::iter::once(0..layers).collect(),
    }
}

/// The rows at their `positions` (ascending, distinct) among `tokens` rows, the others 0.
///
/// Every token fetches its row, or one of zeros: fetching runs in parallel where adding to rows need not.
fn spread(rows: Tensor<2>, positions: &[i64], tokens: usize, model: &Decoder) -> Tensor<2> {
    if positions.len() == tokens {
        return rows;
    }
    let mut sources = vec![positions.len() as i64; tokens];
    for (row, position) in positions.iter().enumerate() {
        sources[*position as usize] = row as i64;
    }
    let zero = Tensor::zeros([1, rows.dims()[1]], (&rows.device(), rows.dtype()));
    Tensor::cat(vec![rows, zero], 0).select(0, model.ids(&sources))
}

/// A segment's forward with its graph.
pub(super) struct Recorded {
    /// What left the segment.
    pub(super) output: Tensor<2>,
    /// What entered it.
    pub(super) leaf: Tensor<2>,
    /// The parameters read on the way.
    pub(super) tape: Tape<'static>,
}

/// Runs a segment from a fresh leaf.
pub(super) fn record(
    model: &Decoder,
    segment: &Range<usize>,
    tape: Tape<'static>,
    input: Tensor<2>,
    needs_input_gradient: bool,
    context: &Context,
) -> Recorded {
    let leaf = input.autodiff();
    let leaf = if needs_input_gradient { leaf.require_grad() } else { leaf };
    let output = run(model, segment, &tape, leaf.clone(), context);
    Recorded { output, leaf, tape }
}

fn run(model: &Decoder, segment: &Range<usize>, tape: &Tape, x: Tensor<2>, context: &Context) -> Tensor<2> {
    model.layers()[segment.clone()].iter().fold(x, |x, layer| layer.forward(tape, x, context, None))
}
