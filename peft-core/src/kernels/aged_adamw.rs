//! AdamW whose bias corrections go by the age of each element, for elements that come and go (SpIEL's accumulated
//! gradients, Ansell et al., arXiv 2401.16405):
//!
//! ```text
//! m ← β₁m + (1−β₁)g        v ← β₂v + (1−β₂)g²
//! θ ← θ − η · m/(1−β₁ᵃ) · √(1−β₂ᵃ)/(√v + ε)        θ ← (1 − ηλ)θ        a ← a + 1
//! ```
//!
//! `ε` is added before the bias correction, other than in PyTorch's AdamW, and the decay, which pulls a weight back to the
//! pretrained one, comes last. The age `a` counts the updates of an element, the coming one included: 1 at first.

#[cfg(feature = "cuda")]
use super::backend::{Kernels, Served, served};
use super::norm::{Clip, clipped};
use burn::tensor::Tensor;

/// The constants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AgedAdamW {
    /// Decay of the first moment.
    pub beta_1: f64,
    /// Decay of the second moment.
    pub beta_2: f64,
    /// ε.
    pub epsilon: f64,
    /// λ.
    pub weight_decay: f64,
}

/// One parameter's update to be made.
pub struct AgedUpdate<T> {
    /// θ.
    pub parameter: T,
    /// g.
    pub gradient: T,
    /// m.
    pub moment_1: T,
    /// v.
    pub moment_2: T,
    /// a, in f32, which counts exactly far beyond any run.
    pub age: T,
    /// η.
    pub rate: f64,
}

/// `1 − βᵃ` of every age, with all digits also where it is tiny: with `x = −a·ln β` it is `1 − e⁻ˣ = 2t/(1 + t)`,
/// `t = tanh(x/2)`.
fn correction<const D: usize>(age: &Tensor<D>, beta: f64) -> Tensor<D> {
    let tanh = age.clone().mul_scalar(-beta.ln() / 2.0).tanh();
    tanh.clone().mul_scalar(2.0) / tanh.add_scalar(1.0)
}

impl AgedAdamW {
    /// Updates many f32 parameters of one device with clipped gradients: returns θ, m, v and a of each, in order.
    /// Gradients whose norm is not finite change nothing.
    pub fn update_all(
        &self,
        updates: Vec<AgedUpdate<Tensor<2>>>,
        clip: Option<&Clip>,
    ) -> Vec<[Tensor<2>; 4]> {
        #[cfg(feature = "cuda")]
        if let Some(first) = updates.first()
            && served(&first.gradient.device(), first.gradient.dtype()) == Some(Served::Cuda)
        {
            return on_cuda(self, updates, clip);
        }
        let factor = clip.map_or(Some(1.0), Clip::factor);
        let one = |update: AgedUpdate<Tensor<2>>| match factor {
            None => [update.parameter, update.moment_1, update.moment_2, update.age],
            Some(factor) => self.update(AgedUpdate { gradient: clipped(update.gradient, factor), ..update }),
        };
        updates.into_iter().map(one).collect()
    }

    /// The composition of burn's operations.
    pub fn update<const D: usize>(&self, update: AgedUpdate<Tensor<D>>) -> [Tensor<D>; 4] {
        let AgedUpdate { parameter, gradient, moment_1, moment_2, age, rate } = update;
        let moment_1 = moment_1.mul_scalar(self.beta_1) + gradient.clone().mul_scalar(1.0 - self.beta_1);
        let moment_2 = moment_2.mul_scalar(self.beta_2) + gradient.square().mul_scalar(1.0 - self.beta_2);
        let scale = correction(&age, self.beta_2).sqrt() / correction(&age, self.beta_1);
        let denominator = moment_2.clone().sqrt().add_scalar(self.epsilon);
        let change = moment_1.clone().mul_scalar(rate) * scale / denominator;
        let parameter = (parameter - change).mul_scalar(1.0 - rate * self.weight_decay);
        [parameter, moment_1, moment_2, age.add_scalar(1.0)]
    }
}

#[cfg(feature = "cuda")]
fn on_cuda(
    optimizer: &AgedAdamW,
    updates: Vec<AgedUpdate<Tensor<2>>>,
    clip: Option<&Clip>,
) -> Vec<[Tensor<2>; 4]> {
    use burn::backend::Cube;
    let updates = updates.into_iter().map(|update| AgedUpdate {
        parameter: Cube::primitive(update.parameter),
        gradient: Cube::primitive(update.gradient),
        moment_1: Cube::primitive(update.moment_1),
        moment_2: Cube::primitive(update.moment_2),
        age: Cube::primitive(update.age),
        rate: update.rate,
    });
    let clip = clip.map(|clip| (Cube::primitive(clip.sum_of_squares.clone()), clip.max_norm));
    let updated = super::cuda::aged_adamw(optimizer, updates.collect(), clip);
    updated.into_iter().map(|tensors| tensors.map(Cube::tensor)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};

    #[test]
    fn corrections_keep_their_digits() {
        for beta in [0.9, 0.999f64] {
            for age in [1.0, 2.0, 7.0, 1000.0, 1e6] {
                let data = TensorData::new(vec![age as f32], [1]);
                let tensor = Tensor::<1>::from_data(data, &Device::flex());
                let found = f64::from(correction(&tensor, beta).into_scalar::<f32>());
                let expected = -(age * beta.ln()).exp_m1();
                assert!((found / expected - 1.0).abs() < 1e-6, "{beta} {age}: {found} {expected}");
            }
        }
    }
}
