//! The size of many tensors together.

use super::backend::{Kernels, served, with_backend};
use burn::tensor::Tensor;

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
