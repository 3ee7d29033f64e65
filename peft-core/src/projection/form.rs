//! What every form of a change has: parameters, a forward, a dense value.

use super::{Parameter, Tape};
use crate::kernels::Term;
use burn::tensor::Tensor;
use std::fmt::Debug;

/// A change of one linear map `y = x·Wᵀ + b` with the weight `W` `[out, in]`.
pub trait Form: Debug + Send + Sync {
    /// Its parameters, in a fixed order. What is shared between modules or drawn from a seed is none of them.
    fn parameters(&self) -> Vec<&Parameter>;

    /// Its parameters, to be changed.
    fn parameters_mut(&mut self) -> Vec<&mut Parameter>;

    /// What the change adds to the forward of the module at `path`. `weight` is the one below the change.
    fn term(&self, tape: &Tape, path: &str, weight: &Tensor<2>) -> Term;

    /// `ΔW` `[out, in]` in f32, relative to the weight in the base's file; `weight` is the one below the change.
    fn dense(&self, weight: &Tensor<2>) -> Tensor<2>;

    /// What is added to the module's bias `[1, out]`, which is given where there is one; `None` where nothing is.
    fn bias_change(&self, _bias: Option<&Tensor<2>>) -> Option<Tensor<2>> {
        None
    }

    /// `(B, A)`, `[out, r]` and `[r, in]`, with `ΔW = B·A` exactly, where there are such and the change is `ΔW` alone.
    fn factors(&self) -> Option<(Tensor<2>, Tensor<2>)> {
        None
    }

    /// Whether `ΔW` does not depend on the weight, so that subtracting it undoes the change.
    fn is_additive(&self) -> bool {
        true
    }

    /// Whether a part of the base weight was taken out for the change to start from.
    fn reduces_base(&self) -> bool {
        false
    }
}
