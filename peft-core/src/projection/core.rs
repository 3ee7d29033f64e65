//! The change `ΔW = s·B·R·A` with a small core `R` between two thin factors (LoRA-XS, Bałazy et al., arXiv 2405.17604;
//! LoRA-SB, Ponkshe et al., arXiv 2411.19557).
//!
//! The core trains, `r²` numbers a module; each factor is frozen unless a method lets it train too. The forward is that of a
//! low-rank change by `B·R` and `A`: `B·R` costs as much as a forward of `r` tokens, and the gradient of `R` comes back
//! through it.

use super::{Form, Parameter, Tape};
use crate::kernels::{LowRankTerm, Term, Up};
use burn::tensor::Tensor;

/// Two factors, the core between them, and a scale.
#[derive(Debug, Clone)]
pub struct Core {
    /// `A`, `[r, in]`, f32.
    pub a: Parameter,
    /// `B`, `[out, r]`, f32.
    pub b: Parameter,
    /// `R`, `[r, r]`, f32.
    pub core: Parameter,
    /// `s`.
    pub scale: f64,
    /// Probability of dropping an input feature of the low-rank path in training.
    pub dropout: f64,
}

impl Core {
    /// `r`.
    pub fn rank(&self) -> usize {
        self.core.value.dims()[0]
    }

    /// `s·B·R`, `[out, r]`.
    fn scaled_b(&self) -> Tensor<2> {
        let (b, core) = (self.b.value.clone(), self.core.value.clone());
        Up::Core { b, core, frozen: None, offset: None }.factor().mul_scalar(self.scale)
    }
}

impl Form for Core {
    fn parameters(&self) -> Vec<&Parameter> {
        vec![&self.a, &self.b, &self.core]
    }

    fn parameters_mut(&mut self) -> Vec<&mut Parameter> {
        vec![&mut self.a, &mut self.b, &mut self.core]
    }

    fn term(&self, tape: &Tape, path: &str, _weight: &Tensor<2>) -> Term {
        Term::LowRank(LowRankTerm {
            a: tape.read(&self.a),
            b: Up::Core { b: tape.read(&self.b), core: tape.read(&self.core), frozen: None, offset: None },
            bias: None,
            gain: None,
            scale: self.scale,
            dropout: tape.dropout(path, self.dropout),
        })
    }

    fn dense(&self, _weight: &Tensor<2>) -> Tensor<2> {
        self.scaled_b().matmul(self.a.value.clone())
    }

    fn factors(&self) -> Option<(Tensor<2>, Tensor<2>)> {
        Some((self.scaled_b(), self.a.value.clone()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::kernels::LinearInput;
    use crate::projection::{Delta, DropoutKey, Projection, project};
    use crate::random::Stream;
    use burn::tensor::{Device, TensorData};

    const SCALE: f64 = 0.5;

    fn random(dims: [usize; 2], seed: u64) -> Tensor<2> {
        let mut stream = Stream::new(seed, "core", "", &[]);
        let values: Vec<f32> = (0..dims[0] * dims[1]).map(|_| stream.normal() as f32).collect();
        Tensor::from_data(TensorData::new(values, dims), &Device::flex())
    }

    fn core(b_trains: bool) -> Core {
        let mut b = Parameter::matrix("b", random([7, 3], 2));
        b.trainable = b_trains;
        let mut core = Parameter::matrix("r", random([3, 3], 3));
        core.trainable = true;
        Core { a: Parameter::matrix("a", random([3, 5], 1)), b, core, scale: SCALE, dropout: 0.0 }
    }

    fn assert_close(found: Tensor<2>, expected: Tensor<2>) {
        assert_eq!(found.dims(), expected.dims());
        let largest = (found - expected).abs().max().into_scalar::<f32>();
        assert!(largest < 1e-5, "{largest}");
    }

    #[test]
    fn dense_change_by_hand() {
        let matrix = |v: Vec<f32>, dims: [usize; 2]| {
            Parameter::matrix("m", Tensor::from_data(TensorData::new(v, dims), &Device::flex()))
        };
        // 2·[[1], [3]]·[[4]]·[[1, −1]].
        let core = Core {
            a: matrix(vec![1., -1.], [1, 2]),
            b: matrix(vec![1., 3.], [2, 1]),
            core: matrix(vec![4.], [1, 1]),
            scale: 2.0,
            dropout: 0.0,
        };
        let dense: Vec<f32> = core.dense(&random([2, 2], 9)).try_into_vec_as().unwrap();
        assert_eq!(dense, [8., -8., 24., -24.]);
        let (b, a) = core.factors().unwrap();
        assert_eq!(b.matmul(a).try_into_vec_as::<f32>().unwrap(), dense);
    }

    /// `∂/∂R = s·Bᵀ·G·Aᵀ` and `∂/∂B = s·G·Aᵀ·Rᵀ` with `G = ∂/∂W`, and a factor that is frozen has no gradient.
    #[test]
    fn gradients_are_those_of_the_dense_change() {
        for b_trains in [false, true] {
            let form = core(b_trains);
            let (a, b, r) = (form.a.value.clone(), form.b.value.clone(), form.core.value.clone());
            let (x, dy) = (random([4, 5], 4), random([4, 7], 5));
            let projection = Projection {
                path: "p".to_string(),
                weight: Parameter::matrix("w", random([7, 5], 6)),
                bias: None,
                delta: Some(Delta::Core(form)),
            };
            let tape = Tape::recording(DropoutKey { seed: 0, step: 0, micro_batch: 0 });
            let leaf = x.clone().autodiff().require_grad();
            let y = project(&tape, &[&projection], LinearInput::Plain(leaf.clone()), None);
            let weight = projection.weight.value.clone();
            let delta = projection.delta.as_ref().unwrap();
            let folded = weight.clone() + delta.dense(&weight);
            assert_close(y.clone().inner(), x.clone().matmul(folded.clone().transpose()));

            let mut grads = (y * dy.clone().autodiff()).sum().backward();
            assert_close(leaf.grad_remove(&mut grads).unwrap(), dy.clone().matmul(folded));
            let mut gradients = tape.gradients(&mut grads);
            let of_weight = dy.transpose().matmul(x);
            let of_core = b.transpose().matmul(of_weight.clone()).matmul(a.clone().transpose());
            assert_close(gradients.remove("r").unwrap(), of_core.mul_scalar(SCALE));
            if b_trains {
                let of_b = of_weight.matmul(a.transpose()).matmul(r.transpose());
                assert_close(gradients.remove("b").unwrap(), of_b.mul_scalar(SCALE));
            }
            assert!(gradients.is_empty(), "{:?}", gradients.keys());
        }
    }
}
