//! The size of many tensors together, and gradients clipped by it.

use super::backend::{Kernels, served, with_backend};
use burn::tensor::Tensor;

/// Clipping of gradients by their norm together, as PyTorch's `clip_grad_norm_` does it: each is multiplied by
/// `min(1, max/(√Σg² + 1e-6))`. The sum may still be on its way from the device.
#[derive(Clone, Debug)]
pub struct Clip {
    /// Σg² over all gradients of the step, `[1]`, f32.
    pub sum_of_squares: Tensor<1>,
    /// The largest norm that is left as it is; infinite for none.
    pub max_norm: f64,
}

/// Added to the norm that clipping divides by.
pub(super) const CLIP_EPSILON: f64 = 1e-6;

impl Clip {
    /// The factor, which waits for the device; `None` where the norm is not finite.
    pub fn factor(&self) -> Option<f64> {
        let squares: f32 = self.sum_of_squares.clone().into_scalar();
        clip_factor(f64::from(squares).sqrt(), self.max_norm)
    }
}

/// The factor of [`Clip`] for this norm; `None` where it is not finite.
pub fn clip_factor(norm: f64, max_norm: f64) -> Option<f64> {
    norm.is_finite().then(|| (max_norm / (norm + CLIP_EPSILON)).min(1.0))
}

/// A gradient times the factor of clipping.
pub fn clipped<const D: usize>(gradient: Tensor<D>, factor: f64) -> Tensor<D> {
    if factor < 1.0 { gradient.mul_scalar(factor) } else { gradient }
}

/// Σ x² over all elements of all tensors, `[1]`, f32; `None` for no tensors.
pub fn sum_of_squares(tensors: Vec<Tensor<2>>) -> Option<Tensor<1>> {
    fn fused<B: Kernels>(tensors: Vec<Tensor<2>>) -> Tensor<1> {
        B::tensor(B::sum_of_squares(tensors.into_iter().map(B::primitive).collect()))
    }
    let first = tensors.first()?;
    Some(match served(&first.device(), first.dtype()) {
        Some(served) => with_backend!(served, fused(tensors)),
        None => {
            let squares = tensors.into_iter().map(|tensor| tensor.square().sum()).collect();
            Tensor::cat(squares, 0).sum()
        }
    })
}
