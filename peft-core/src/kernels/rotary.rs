//! Rotary position embedding in the half-split layout of Hugging Face checkpoints (Su et al., arXiv 2104.09864):
//! feature `i` and `i + d/2` of a head form the pair that is rotated by `position · θ_i`.

use super::as_dtype;
use burn::tensor::Tensor;

/// Rotates the heads of `x`.
///
/// # Shapes
/// `x` `[batch, heads, time, head_dim]`; `cos` and `sin` `[1 or batch, 1, time, head_dim / 2]`, cast to the type of `x`.
pub fn rotate(x: Tensor<4>, cos: Tensor<4>, sin: Tensor<4>) -> Tensor<4> {
    let half = x.dims()[3] / 2;
    let (cos, sin) = (as_dtype(cos, x.dtype()), as_dtype(sin, x.dtype()));
    let first = x.clone().narrow(3, 0, half);
    let second = x.narrow(3, half, half);
    let rotated =
        vec![first.clone() * cos.clone() - second.clone() * sin.clone(), second * cos + first * sin];
    Tensor::cat(rotated, 3)
}
