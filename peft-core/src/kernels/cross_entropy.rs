//! Cross-entropy of a chunk of logits, its gradient and the count of correct predictions, in one pass:
//! `ℓ = Σ_i w_i (logsumexp(z_i) − z_i[t_i])`, `∂ℓ/∂z_i = w_i (softmax(z_i) − e_{t_i})`.

use super::as_dtype;
use super::backend::{Kernels, served, with_backend};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor};

/// Loss and gradient of one chunk.
pub struct CrossEntropy {
    /// Sum of the losses in nats, `[1]`, f32.
    pub loss_sum: Tensor<1>,
    /// How many rows have their target as the largest logit, `[1]`.
    pub correct: Tensor<1, Int>,
    /// Gradient of `scale · loss_sum` with respect to the logits, `[rows, vocab]`, in their type; absent when not asked.
    pub gradient: Option<Tensor<2>>,
}

/// [`CrossEntropy`] as a backend has it.
pub(super) struct CrossEntropyParts<B: Kernels> {
    pub loss_sum: FloatTensor<B>,
    pub correct: IntTensor<B>,
    pub gradient: Option<FloatTensor<B>>,
}

/// Cross-entropy of `logits` against `targets`. The gradient takes the place of the logits where nobody else holds them.
///
/// # Shapes
/// `logits` `[rows, vocab]` without an autodiff graph, `targets` `[rows]`. `gradient_scale` asks for the gradient of
/// `scale · loss_sum`.
pub fn cross_entropy(
    logits: Tensor<2>,
    targets: Tensor<1, Int>,
    gradient_scale: Option<f64>,
) -> CrossEntropy {
    match served(&logits.device(), logits.dtype()) {
        Some(served) => with_backend!(served, fused(logits, targets, gradient_scale)),
        None => plain(logits, targets, gradient_scale),
    }
}

/// Cross-entropy of the logits of a frozen head, `rows·Wᵀ`, of which at most `chunk` rows are held at a time. The
/// gradient is that of `scale · loss_sum` with respect to the rows.
///
/// # Shapes
/// `rows` `[rows, hidden]` and `weight` `[vocab, hidden]`, of one type and without an autodiff graph; `targets` `[rows]`.
pub fn head_loss(
    rows: Tensor<2>,
    weight: Tensor<2>,
    targets: Tensor<1, Int>,
    chunk: usize,
    gradient_scale: Option<f64>,
) -> CrossEntropy {
    if let Some(served) = served(&rows.device(), rows.dtype()) {
        return with_backend!(served, fused_head(rows, weight, targets, chunk, gradient_scale));
    }
    let count = rows.dims()[0];
    let mut chunks = (0..count).step_by(chunk).map(|start| {
        let length = chunk.min(count - start);
        let logits = rows.clone().narrow(0, start, length).matmul(weight.clone().transpose());
        let mut out = plain(logits, targets.clone().narrow(0, start, length), gradient_scale);
        out.gradient = out.gradient.map(|gradient| gradient.matmul(weight.clone()));
        out
    });
    let Some(CrossEntropy { mut loss_sum, mut correct, gradient }) = chunks.next() else {
        let device = rows.device();
        let nothing = gradient_scale.map(|_| rows);
        return CrossEntropy {
            loss_sum: Tensor::zeros([1], &device),
            correct: Tensor::zeros([1], &device),
            gradient: nothing,
        };
    };
    let mut gradients = Vec::from_iter(gradient);
    for out in chunks {
        (loss_sum, correct) = (loss_sum + out.loss_sum, correct + out.correct);
        gradients.extend(out.gradient);
    }
    let gradient = (!gradients.is_empty()).then(|| Tensor::cat(gradients, 0));
    CrossEntropy { loss_sum, correct, gradient }
}

fn fused_head<B: Kernels>(
    rows: Tensor<2>,
    weight: Tensor<2>,
    targets: Tensor<1, Int>,
    chunk: usize,
    gradient_scale: Option<f64>,
) -> CrossEntropy {
    let (rows, weight) = (B::primitive(rows), B::primitive(weight));
    let scale = gradient_scale.map(|scale| scale as f32);
    scored::<B>(B::head_loss(&rows, &weight, &B::integers(targets), chunk, scale))
}

fn scored<B: Kernels>(parts: CrossEntropyParts<B>) -> CrossEntropy {
    CrossEntropy {
        loss_sum: B::tensor(parts.loss_sum),
        correct: B::integer_tensor(parts.correct),
        gradient: parts.gradient.map(B::tensor),
    }
}

fn fused<B: Kernels>(
    logits: Tensor<2>,
    targets: Tensor<1, Int>,
    gradient_scale: Option<f64>,
) -> CrossEntropy {
    let (logits, targets) = (B::primitive(logits), B::integers(targets));
    scored::<B>(B::cross_entropy(logits, &targets, gradient_scale.map(|scale| scale as f32)))
}

/// The composition of burn's operations.
pub(super) fn plain(logits: Tensor<2>, targets: Tensor<1, Int>, gradient_scale: Option<f64>) -> CrossEntropy {
    let dtype = logits.dtype();
    let logits = as_dtype(logits, DType::F32);
    let targets = targets.unsqueeze_dim::<2>(1);
    let correct = logits.clone().argmax(1).equal(targets.clone()).int().sum();

    let max = logits.clone().max_dim(1);
    let shifted = logits - max;
    let target_logit = shifted.clone().gather(1, targets.clone());
    let exponent = shifted.exp();
    let sum = exponent.clone().sum_dim(1);
    let loss_sum = (sum.clone().log() - target_logit).sum();

    let gradient = gradient_scale.map(|scale| {
        let probability = exponent * sum.recip().mul_scalar(scale);
        let minus_one = Tensor::full(targets.shape(), -scale, (&probability.device(), DType::F32));
        as_dtype(probability.scatter(1, targets, minus_one, IndexingUpdateOp::Add), dtype)
    });
    CrossEntropy { loss_sum, correct, gradient }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};

    #[test]
    fn hand_computed_two_rows() {
        let device = Device::flex();
        // Row 0: logits (ln 1, ln 2, ln 5) = probabilities (1/8, 2/8, 5/8), target 1. Row 1: equal logits, target 0.
        let logits = vec![0.0, 2f32.ln(), 5f32.ln(), 7.0, 7.0, 7.0];
        let logits = Tensor::<2>::from_data(TensorData::new(logits, [2, 3]), &device);
        let targets = Tensor::<1, Int>::from_data(TensorData::new(vec![1i64, 0], [2]), &device);
        let out = cross_entropy(logits, targets, Some(0.5));
        let loss: f32 = out.loss_sum.into_scalar();
        assert!((loss - (4f32.ln() + 3f32.ln())).abs() < 1e-6);
        let gradient: Vec<f32> = out.gradient.unwrap().try_into_vec_as().unwrap();
        let expected = [1. / 16., 1. / 8. - 0.5, 5. / 16., 1. / 6. - 0.5, 1. / 6., 1. / 6.];
        for (g, e) in gradient.iter().zip(expected) {
            assert!((g - e).abs() < 1e-6, "{gradient:?}");
        }
    }
}
