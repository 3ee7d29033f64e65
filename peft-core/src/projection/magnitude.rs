//! Weight-decomposed adaptation (DoRA, Liu et al., arXiv 2402.09353): the adapted weight is `W' = m/n ∘ V` with
//! `V = W + s·B·A`, where `n` are the lengths of the rows of `V` and `m` trains. `n` counts as a constant in the backward
//! (section 4.3).
//!
//! `V` is never built: `n_i² = ‖W_i‖² + 2s·(W·Aᵀ)_i·B_i + s²·B_i·(A·Aᵀ)·B_iᵀ`, which costs as much as a forward of `r`
//! tokens.

use super::{Parameter, Tape};
use crate::kernels::as_dtype;
use burn::tensor::{DType, Tensor};

/// Trained lengths of the rows of a changed weight.
#[derive(Debug, Clone)]
pub struct Magnitude {
    /// `m`, held as `[1, out]`.
    pub lengths: Parameter,
    /// `‖W_i‖²`, `[1, out]`, f32.
    base_squares: Tensor<2>,
}

impl Magnitude {
    /// Lengths named `name` for the change of `weight` `[out, in]` by `scale · b·a`. They start as the lengths of the
    /// changed rows, so that magnitudes alone change nothing.
    pub fn new(name: String, weight: &Tensor<2>, a: &Tensor<2>, b: &Tensor<2>, scale: f64) -> Self {
        let rows = weight.dims()[0];
        let base_squares = as_dtype(weight.clone(), DType::F32).square().sum_dim(1).reshape([1, rows]);
        let value = row_lengths(&base_squares, weight, a, b, scale);
        let lengths = Parameter { name, value, shape: vec![rows], trainable: false };
        Self { lengths, base_squares }
    }

    /// `m/n`, `[1, out]`.
    pub(super) fn gain(
        &self,
        tape: &Tape,
        weight: &Tensor<2>,
        a: &Tensor<2>,
        b: &Tensor<2>,
        scale: f64,
    ) -> Tensor<2> {
        tape.read(&self.lengths) / row_lengths(&self.base_squares, weight, a, b, scale)
    }
}

/// `n` as `[1, out]`, in f32.
fn row_lengths(
    base_squares: &Tensor<2>,
    weight: &Tensor<2>,
    a: &Tensor<2>,
    b: &Tensor<2>,
    scale: f64,
) -> Tensor<2> {
    let a_transposed = a.clone().transpose();
    let crossed = weight.clone().matmul(as_dtype(a_transposed.clone(), weight.dtype()));
    let crossed = as_dtype(crossed, DType::F32).mul_scalar(2.0 * scale);
    let own = b.clone().matmul(a.clone().matmul(a_transposed)).mul_scalar(scale * scale);
    let change = ((crossed + own) * b.clone()).sum_dim(1);
    let squares = base_squares.clone() + change.reshape(base_squares.dims());
    squares.clamp_min(0.0).sqrt()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use burn::tensor::{Device, TensorData};

    #[test]
    fn lengths_of_the_changed_rows_by_hand() {
        let device = Device::flex();
        let matrix =
            |v: Vec<f32>, dims: [usize; 2]| Tensor::<2>::from_data(TensorData::new(v, dims), &device);
        // V = [[1, 0], [0, 2]] + 2·[[1], [1]]·[[1, 2]] = [[3, 4], [2, 6]].
        let (weight, a) = (matrix(vec![1., 0., 0., 2.], [2, 2]), matrix(vec![1., 2.], [1, 2]));
        let b = matrix(vec![1., 1.], [2, 1]);
        let magnitude = Magnitude::new("m".to_string(), &weight, &a, &b, 2.0);
        let lengths = magnitude.lengths.to_host();
        assert!((lengths[0] - 5.0).abs() < 1e-6 && (lengths[1] - 40f32.sqrt()).abs() < 1e-6, "{lengths:?}");
        let gain = magnitude.gain(&Tape::inference(), &weight, &a, &b, 2.0);
        assert!(gain.try_into_vec_as::<f32>().unwrap().iter().all(|g| (g - 1.0).abs() < 1e-6));
    }
}
