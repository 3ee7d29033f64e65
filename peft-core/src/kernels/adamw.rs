//! AdamW: Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), as PyTorch computes it:
//!
//! ```text
//! m ← β₁m + (1−β₁)g        v ← β₂v + (1−β₂)g²
//! θ ← (1 − ηλ)θ − η/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε)
//! ```

use super::backend::{Kernels, served, with_backend};
use super::norm::{Clip, clipped};
use super::settled::settled;
use burn::optim::{LearningRate, Optimizer, RecordState, StateSink, StateSource};
use burn::tensor::{Device, Tensor};

/// AdamW's constants.
#[derive(Clone, Debug)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta_1: f64,
    /// Decay of the second moment.
    pub beta_2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// λ, the decoupled weight decay.
    pub weight_decay: f64,
}

/// AdamW's memory of one parameter.
#[derive(Clone)]
pub struct AdamWState<const D: usize> {
    /// m.
    pub moment_1: Tensor<D>,
    /// v.
    pub moment_2: Tensor<D>,
    /// t, updates done so far.
    pub time: i64,
}

impl<const D: usize> AdamWState<D> {
    /// Of a parameter that was never updated and has gradients like this.
    pub fn new(gradient: &Tensor<D>) -> Self {
        let [moment_1, moment_2] = [(); 2].map(|()| settled(gradient.zeros_like()));
        Self { moment_1, moment_2, time: 0 }
    }
}

/// One parameter's update to be made, its memory not empty.
pub struct Update<T> {
    /// θ.
    pub parameter: T,
    /// g.
    pub gradient: T,
    /// m.
    pub moment_1: T,
    /// v.
    pub moment_2: T,
    /// η.
    pub rate: f64,
    /// t, this update counted.
    pub time: i64,
}

impl AdamW {
    /// `1 − β₁ᵗ` and `√(1 − β₂ᵗ)`, in f64, where they keep their digits while they are tiny.
    pub(super) fn corrections(&self, time: i64) -> (f64, f64) {
        (1.0 - self.beta_1.powf(time as f64), (1.0 - self.beta_2.powf(time as f64)).sqrt())
    }

    /// Updates many f32 parameters of one device together, with clipped gradients: returns θ, m and v of each, in order.
    /// Where nobody else holds them, they keep their memory. Gradients whose norm is not finite change nothing.
    pub fn update_all(&self, updates: Vec<Update<Tensor<2>>>, clip: Option<&Clip>) -> Vec<[Tensor<2>; 3]> {
        let Some(first) = updates.first() else { return Vec::new() };
        match served(&first.gradient.device(), first.gradient.dtype()) {
            Some(served) => with_backend!(served, fused(self, updates, clip)),
            None => {
                let factor = clip.map_or(Some(1.0), Clip::factor);
                let one = |update: Update<Tensor<2>>| match factor {
                    None => [update.parameter, update.moment_1, update.moment_2],
                    Some(factor) => {
                        self.update(Update { gradient: clipped(update.gradient, factor), ..update })
                    }
                };
                updates.into_iter().map(one).collect()
            }
        }
    }

    /// The composition of burn's operations.
    pub(super) fn update<const D: usize>(&self, update: Update<Tensor<D>>) -> [Tensor<D>; 3] {
        let Update { parameter, gradient, moment_1, moment_2, rate, time } = update;
        let moment_1 = moment_1.mul_scalar(self.beta_1) + gradient.clone().mul_scalar(1.0 - self.beta_1);
        let moment_2 = moment_2.mul_scalar(self.beta_2) + gradient.square().mul_scalar(1.0 - self.beta_2);
        let (correction_1, correction_2) = self.corrections(time);
        let denominator = moment_2.clone().sqrt().div_scalar(correction_2).add_scalar(self.epsilon);
        let change = moment_1.clone().mul_scalar(rate / correction_1) / denominator;
        let decayed = match self.weight_decay {
            0.0 => parameter,
            decay => parameter.mul_scalar(1.0 - rate * decay),
        };
        [decayed - change, moment_1, moment_2]
    }
}

fn fused<B: Kernels>(
    optimizer: &AdamW,
    updates: Vec<Update<Tensor<2>>>,
    clip: Option<&Clip>,
) -> Vec<[Tensor<2>; 3]> {
    let updates = updates.into_iter().map(|update| Update {
        parameter: B::primitive(update.parameter),
        gradient: B::primitive(update.gradient),
        moment_1: B::primitive(update.moment_1),
        moment_2: B::primitive(update.moment_2),
        rate: update.rate,
        time: update.time,
    });
    let clip = clip.map(|clip| (B::primitive(clip.sum_of_squares.clone()), clip.max_norm));
    let updated = B::adamw(optimizer, updates.collect(), clip);
    updated.into_iter().map(|tensors| tensors.map(B::tensor)).collect()
}

impl<const D: usize> RecordState for AdamWState<D> {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        out.push_tensor(prefix, "moment_1", self.moment_1.to_data());
        out.push_tensor(prefix, "moment_2", self.moment_2.to_data());
        out.push_scalar(prefix, "time", self.time.into());
    }

    fn state_unflatten(prefix: &str, src: &mut StateSource, device: &Device) -> Option<Self> {
        let mut take = |name| Some(settled(Tensor::from_data(src.take_tensor(prefix, name)?, device)));
        Some(Self {
            moment_1: take("moment_1")?,
            moment_2: take("moment_2")?,
            time: src.take_scalar(prefix, "time")?.try_into().ok()?,
        })
    }
}

impl Optimizer for AdamW {
    type State<const D: usize> = AdamWState<D>;

    fn step<const D: usize>(
        &self,
        lr: LearningRate,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<D>, Option<Self::State<D>>) {
        let AdamWState { moment_1, moment_2, time } = state.unwrap_or_else(|| AdamWState::new(&grad));
        let time = time + 1;
        let update = Update { parameter: tensor, gradient: grad, moment_1, moment_2, rate: lr, time };
        let [parameter, moment_1, moment_2] = self.update(update);
        (parameter, Some(AdamWState { moment_1, moment_2, time }))
    }

    fn to_device<const D: usize>(mut state: Self::State<D>, device: &Device) -> Self::State<D> {
        state.moment_1 = state.moment_1.to_device(device);
        state.moment_2 = state.moment_2.to_device(device);
        state
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::TensorData;

    /// Two steps worked out by hand with β₁ = 0.5, β₂ = 0.75, ε = 0, λ = 0.1, η = 0.1 on θ = 1, g = 2 then −1.
    #[test]
    fn two_steps_by_hand() {
        let device = Device::flex();
        let scalar = |v: f32| Tensor::<1>::from_data(TensorData::new(vec![v], [1]), &device);
        let optimizer = AdamW { beta_1: 0.5, beta_2: 0.75, epsilon: 0.0, weight_decay: 0.1 };
        let (theta, state) = optimizer.step(0.1, scalar(1.0), scalar(2.0), None);
        // m = 1, m̂ = 2; v = 1, v̂ = 4: the update is η·2/2, and the decay takes 0.01.
        assert!((theta.clone().into_scalar::<f32>() - 0.89).abs() < 1e-6);
        let (theta, _) = optimizer.step(0.1, theta, scalar(-1.0), state);
        // m = 0, so only the decay acts: 0.89·0.99.
        assert!((theta.into_scalar::<f32>() - 0.8811).abs() < 1e-6);
    }
}
