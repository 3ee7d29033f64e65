//! The change `ΔW = s·B·A` of rank `r` (LoRA, Hu et al., arXiv 2106.09685, equation 3).

use super::{Parameter, Tape};
use crate::kernels::LowRankTerm;
use burn::tensor::Tensor;

/// Two factors and a scale.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// `A`, `[r, in]`, f32.
    pub a: Parameter,
    /// `B`, `[out, r]`, f32.
    pub b: Parameter,
    /// `s`: `alpha / r`, or `alpha / √r` for rank-stabilised LoRA.
    pub scale: f64,
    /// Probability of dropping an input feature of the low-rank path in training.
    pub dropout: f64,
}

impl LowRank {
    /// `r`.
    pub fn rank(&self) -> usize {
        self.a.value.dims()[0]
    }

    /// `ΔW` as a dense `[out, in]` tensor.
    pub fn dense(&self) -> Tensor<2> {
        self.b.value.clone().matmul(self.a.value.clone()).mul_scalar(self.scale)
    }

    pub(super) fn term(&self, tape: &Tape, path: &str, x: &Tensor<2>) -> LowRankTerm {
        LowRankTerm {
            a: tape.read(&self.a),
            b: tape.read(&self.b),
            scale: self.scale,
            mask: tape.dropout_mask(path, self.dropout, x.dims(), &x.device().without_autodiff()),
        }
    }
}
