//! A linear map of a transformer: a base weight plus at most one change on top.
//!
//! The base keeps the checkpoint's own layout `[out, in]` (`y = x·Wᵀ + b`). The change, a [`Delta`], is one of a few
//! algebraic forms, one file each; methods decide where it attaches and with which initial values.

mod combination;
mod core;
mod embedding;
mod form;
mod gains;
mod low_rank;
mod magnitude;
mod parameter;
mod random_pair;
mod sparse;
mod spectral;
mod tape;

pub use self::core::Core;
pub use combination::{Combination, CombinedFactor, pull_back, refresh};
pub use embedding::{Embedding, TokenRows};
pub use form::Form;
pub use gains::Gains;
pub use low_rank::{LowRank, Removed};
pub use magnitude::Magnitude;
pub use parameter::Parameter;
pub use random_pair::RandomPair;
pub use sparse::Sparse;
pub use spectral::Spectral;
pub use tape::{DropoutKey, InputObserver, Tape};

use crate::kernels::{AdaptedLinear, LinearInput, Residual, adapted_linears};
use burn::tensor::Tensor;
use std::ops::{Deref, DerefMut};

/// The forms that a change of a weight can take.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // There is one a module, and boxes would spread over everything that makes one.
pub enum Delta {
    /// `s·B·A`.
    LowRank(LowRank),
    /// Factors on inputs and results.
    Gains(Gains),
    /// Two vectors around a shared random pair.
    RandomPair(RandomPair),
    /// `s·B·R·A`.
    Core(Core),
    /// Values at positions.
    Sparse(Sparse),
    /// `s·B·A` with factors that are combinations of random matrices.
    Combination(Combination),
    /// `s·(B·S − B₀·S₀)·A`, with columns of `B` that stop training.
    Spectral(Spectral),
}

impl Deref for Delta {
    type Target = dyn Form;

    fn deref(&self) -> &Self::Target {
        match self {
            Delta::LowRank(form) => form,
            Delta::Gains(form) => form,
            Delta::RandomPair(form) => form,
            Delta::Core(form) => form,
            Delta::Sparse(form) => form,
            Delta::Combination(form) => form,
            Delta::Spectral(form) => form,
        }
    }
}

impl DerefMut for Delta {
    fn deref_mut(&mut self) -> &mut Self::Target {
        match self {
            Delta::LowRank(form) => form,
            Delta::Gains(form) => form,
            Delta::RandomPair(form) => form,
            Delta::Core(form) => form,
            Delta::Sparse(form) => form,
            Delta::Combination(form) => form,
            Delta::Spectral(form) => form,
        }
    }
}

/// A frozen or trained weight `[out, in]` with an optional bias and an optional change.
#[derive(Debug, Clone)]
pub struct Projection {
    /// The module's path in the checkpoint, `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// `W`.
    pub weight: Parameter,
    /// `b`, held as `[1, out]`.
    pub bias: Option<Parameter>,
    /// The change.
    pub delta: Option<Delta>,
}

impl Projection {
    /// `[out, in]`.
    pub fn dims(&self) -> [usize; 2] {
        self.weight.value.dims()
    }

    /// Every parameter of the projection: weight, bias, change.
    pub fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        let delta = self.delta.iter().flat_map(|delta| delta.parameters());
        std::iter::once(&self.weight).chain(&self.bias).chain(delta)
    }

    /// Every parameter, to be changed.
    pub fn parameters_mut(&mut self) -> impl Iterator<Item = &mut Parameter> {
        let delta = self.delta.iter_mut().flat_map(|delta| delta.parameters_mut());
        std::iter::once(&mut self.weight).chain(&mut self.bias).chain(delta)
    }
}

/// Applies projections to one input: their results side by side, plus `residual`.
///
/// # Shapes
/// The input `[tokens, in]`, `residual` and the result `[tokens, out₁ + out₂ + …]`.
pub fn project(
    tape: &Tape,
    projections: &[&Projection],
    input: LinearInput,
    residual: Option<Residual>,
) -> Tensor<2> {
    // Observers look at the value that the projections get.
    let input = if tape.observes() { LinearInput::Plain(input.value()) } else { input };
    let maps = projections.iter().map(|projection| {
        if let LinearInput::Plain(x) = &input {
            tape.observe(&projection.path, x);
        }
        let term = projection.delta.as_ref();
        let term = term.map(|delta| delta.term(tape, &projection.path, &projection.weight.value));
        let bias = projection.bias.as_ref().map(|bias| tape.read(bias));
        AdaptedLinear { weight: tape.read(&projection.weight), bias, term }
    });
    let maps = maps.collect();
    adapted_linears(input, maps, residual, tape.recomputes())
}
