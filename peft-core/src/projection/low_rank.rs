//! The change `ΔW = s·B·A` of rank `r` (LoRA, Hu et al., arXiv 2106.09685, equation 3), with the parts that PEFT lets it
//! have: a bias beside `B`, and the magnitudes of DoRA.

use super::{Form, Magnitude, Parameter, Tape};
use crate::kernels::{LowRankTerm, Term, Up, as_dtype};
use burn::tensor::{DType, Tensor};

/// Two factors and a scale.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// `A`, `[r, in]`, f32.
    pub a: Parameter,
    /// `B`, `[out, r]`, f32.
    pub b: Parameter,
    /// A bias `[1, out]` of the low-rank path, scaled like it.
    pub bias: Option<Parameter>,
    /// Lengths of the rows of `W + ΔW` (DoRA).
    pub magnitude: Option<Magnitude>,
    /// `s`: `alpha / r`, or `alpha / √r` for rank-stabilised LoRA.
    pub scale: f64,
    /// Probability of dropping an input feature of the low-rank path in training.
    pub dropout: f64,
    /// What the base was reduced by for the factors to start from, if it was.
    pub removed: Option<Removed>,
}

/// Factors whose product was taken out of the base weight, `W ← W − s·B₀·A₀`: relative to the weight in the base's
/// file, the change is `s·(B·A − B₀·A₀)`.
#[derive(Debug, Clone)]
pub struct Removed {
    /// `A₀`, `[r, in]`, f32.
    pub a: Tensor<2>,
    /// `B₀`, `[out, r]`, f32.
    pub b: Tensor<2>,
}

impl LowRank {
    /// `r`.
    pub fn rank(&self) -> usize {
        self.a.value.dims()[0]
    }

    /// `(A, B)` of the change relative to the weight in the base's file, with the same `s`: the factors themselves, or
    /// with something removed `[A; A₀]` and `[B, −B₀]` of rank `2·r`.
    pub fn whole_factors(&self) -> (Tensor<2>, Tensor<2>) {
        let (a, b) = (self.a.value.clone(), self.b.value.clone());
        match &self.removed {
            None => (a, b),
            Some(Removed { a: a_0, b: b_0 }) => {
                (Tensor::cat(vec![a, a_0.clone()], 0), Tensor::cat(vec![b, b_0.clone().neg()], 1))
            }
        }
    }

    /// What the change adds to a linear map with the weight `weight` `[out, in]` on the input `x` `[tokens, in]`.
    fn low_rank_term(&self, tape: &Tape, path: &str, weight: &Tensor<2>) -> LowRankTerm {
        let (a, b) = (&self.a.value, &self.b.value);
        LowRankTerm {
            a: tape.read(&self.a),
            b: Up::Matrix(tape.read(&self.b)),
            bias: self.bias.as_ref().map(|bias| tape.read(bias)),
            gain: self.magnitude.as_ref().map(|magnitude| magnitude.gain(tape, weight, a, b, self.scale)),
            scale: self.scale,
            dropout: tape.dropout(path, self.dropout),
        }
    }
}

impl Form for LowRank {
    fn parameters(&self) -> Vec<&Parameter> {
        let magnitude = self.magnitude.as_ref().map(|magnitude| &magnitude.lengths);
        [&self.a, &self.b].into_iter().chain(&self.bias).chain(magnitude).collect()
    }

    fn parameters_mut(&mut self) -> Vec<&mut Parameter> {
        let magnitude = self.magnitude.as_mut().map(|magnitude| &mut magnitude.lengths);
        [&mut self.a, &mut self.b].into_iter().chain(&mut self.bias).chain(magnitude).collect()
    }

    fn term(&self, tape: &Tape, path: &str, weight: &Tensor<2>) -> Term {
        Term::LowRank(self.low_rank_term(tape, path, weight))
    }

    fn dense(&self, weight: &Tensor<2>) -> Tensor<2> {
        let (a, b) = self.whole_factors();
        let product = b.matmul(a).mul_scalar(self.scale);
        let Some(magnitude) = &self.magnitude else { return product };
        // m/n ∘ (W + s·B·A) − W.
        let (a, b) = (&self.a.value, &self.b.value);
        let gain = magnitude.gain(&Tape::inference(), weight, a, b, self.scale).transpose();
        let weight = as_dtype(weight.clone(), DType::F32);
        (weight.clone() + product) * gain - weight
    }

    fn bias_change(&self, _bias: Option<&Tensor<2>>) -> Option<Tensor<2>> {
        self.bias.as_ref().map(|bias| bias.value.clone().mul_scalar(self.scale))
    }

    fn factors(&self) -> Option<(Tensor<2>, Tensor<2>)> {
        let (a, b) = self.whole_factors();
        let is_plain = self.magnitude.is_none() && self.bias.is_none();
        is_plain.then(|| (b.mul_scalar(self.scale), a))
    }

    fn is_additive(&self) -> bool {
        self.magnitude.is_none()
    }

    fn reduces_base(&self) -> bool {
        self.removed.is_some()
    }
}
