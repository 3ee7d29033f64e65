//! Root-mean-square norm: `y = w ∘ x / √(mean(x²) + ε)` (Zhang and Sennrich, arXiv 1910.07467).

use super::as_dtype;
use burn::tensor::{DType, Tensor};

/// Normalises each row.
///
/// # Shapes
/// `x` `[rows, features]`, `weight` `[1, features]`. The norm is taken in f32 and cast back before the weight is
/// applied, as transformers does.
pub fn rms_norm(x: Tensor<2>, weight: Tensor<2>, epsilon: f64) -> Tensor<2> {
    let dtype = x.dtype();
    let x = as_dtype(x, DType::F32);
    let mean_square = x.clone().square().mean_dim(1);
    let normed = x / mean_square.add_scalar(epsilon).sqrt();
    as_dtype(normed, dtype) * as_dtype(weight, dtype)
}
