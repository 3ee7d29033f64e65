//! The loss from hidden states: head and cross-entropy in chunks of rows, so that no step ever holds the logits of
//! more rows than a chunk.

use super::step::add_gradients;
use crate::kernels::{self, CrossEntropy, as_dtype, backward_from, cross_entropy};
use crate::model::Decoder;
use crate::projection::{DropoutKey, Tape};
use burn::tensor::{Device, Int, Tensor};
use std::collections::BTreeMap;

/// Logits held at a time when no chunk size is asked for: few enough to stay in the caches of a CPU, or many enough to
/// keep a GPU busy.
const CHUNK_ELEMENTS: (usize, usize) = (1 << 22, 1 << 27);

/// Loss over supervised rows and what follows from it.
pub(super) struct HeadLoss {
    /// Sum of the losses, `[1]`.
    pub loss_sum: Tensor<1>,
    /// Rows predicted correctly, `[1]`.
    pub correct: Tensor<1, Int>,
    /// Gradient of `scale · loss_sum` with respect to the rows, `[rows, hidden]`.
    pub gradient: Option<Tensor<2>>,
}

/// Rows of logits held at a time: as asked for, else by the vocabulary's size, and of `count` at most all. `host` says
/// that the device is the CPU.
pub(super) fn chunk_rows(asked: Option<usize>, vocab_size: usize, count: usize, host: bool) -> usize {
    let elements = if host { CHUNK_ELEMENTS.0 } else { CHUNK_ELEMENTS.1 };
    asked.unwrap_or(elements / vocab_size).clamp(1, count.max(1))
}

/// Sums cross-entropy over `rows` `[rows, hidden]` (after the final norm, without autodiff) against `targets`.
///
/// With `backward` = (scale, key), gradients of the head's trainable parameters are added to `gradients` and that of
/// the rows is returned.
pub(super) fn head_loss(
    model: &Decoder,
    rows: Tensor<2>,
    targets: Tensor<1, Int>,
    chunk_rows: Option<usize>,
    backward: Option<(f64, DropoutKey)>,
    gradients: &mut BTreeMap<String, Tensor<2>>,
) -> HeadLoss {
    let [count, _] = rows.dims();
    let chunk = self::chunk_rows(chunk_rows, model.config.vocab_size, count, model.device == Device::flex());
    if let Some(weight) = model.frozen_head() {
        let weight = as_dtype(weight, model.dtype);
        let scale = backward.map(|(scale, _)| scale);
        let CrossEntropy { loss_sum, correct, gradient } =
            kernels::head_loss(rows, weight, targets, chunk, scale);
        return HeadLoss { loss_sum, correct, gradient };
    }
    let device = &model.device;
    let mut loss_sum = Tensor::zeros([1], device);
    let mut correct = Tensor::zeros([1], device);
    let mut row_gradients = Vec::new();
    for start in (0..count).step_by(chunk) {
        let length = chunk.min(count - start);
        let x = rows.clone().narrow(0, start, length);
        let t = targets.clone().narrow(0, start, length);
        let out = match backward {
            None => cross_entropy(model.head(&Tape::inference(), x), t, None),
            Some((scale, key)) => {
                let tape = Tape::recording(key);
                let leaf = x.autodiff().require_grad();
                let logits = model.head(&tape, leaf.clone());
                let mut out = cross_entropy(logits.clone().inner(), t, Some(scale));
                if let Some(gradient) = out.gradient.take() {
                    let mut grads = backward_from(logits, gradient);
                    row_gradients.extend(leaf.grad_remove(&mut grads));
                    add_gradients(gradients, tape.gradients(&mut grads));
                }
                out
            }
        };
        let CrossEntropy { loss_sum: loss, correct: right, .. } = out;
        loss_sum = loss_sum + loss;
        correct = correct + right;
    }
    let gradient = (!row_gradients.is_empty()).then(|| Tensor::cat(row_gradients, 0));
    HeadLoss { loss_sum, correct, gradient }
}
