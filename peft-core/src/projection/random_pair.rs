//! A frozen random pair that all modules share, with two trained vectors for each of them (VeRA, Kopiczko et al., arXiv
//! 2310.11454, equation 2): `ΔW = Λ_b·B·Λ_d·A`, where `Λ` are diagonal matrices of the vectors.

use super::{Form, Parameter, Tape};
use crate::kernels::{LowRankTerm, Term, Up};
use burn::tensor::Tensor;

/// Two vectors around a frozen pair.
#[derive(Debug, Clone)]
pub struct RandomPair {
    /// `A`, `[r, in]`, f32.
    pub a: Tensor<2>,
    /// `B`, `[out, r]`, f32.
    pub b: Tensor<2>,
    /// `d`, held as `[1, r]`.
    pub lambda_d: Parameter,
    /// `b`, held as `[1, out]`.
    pub lambda_b: Parameter,
    /// Probability of dropping an input feature of the path in training.
    pub dropout: f64,
}

impl Form for RandomPair {
    fn parameters(&self) -> Vec<&Parameter> {
        vec![&self.lambda_b, &self.lambda_d]
    }

    fn parameters_mut(&mut self) -> Vec<&mut Parameter> {
        vec![&mut self.lambda_b, &mut self.lambda_d]
    }

    fn term(&self, tape: &Tape, path: &str, _weight: &Tensor<2>) -> Term {
        Term::LowRank(LowRankTerm {
            a: self.a.clone(),
            b: Up::Scaled {
                b: self.b.clone(),
                outer: tape.read(&self.lambda_b),
                inner: tape.read(&self.lambda_d),
            },
            bias: None,
            gain: None,
            scale: 1.0,
            dropout: tape.dropout(path, self.dropout),
        })
    }

    fn dense(&self, _weight: &Tensor<2>) -> Tensor<2> {
        let (b, a) = self.scaled();
        b.matmul(a)
    }

    fn factors(&self) -> Option<(Tensor<2>, Tensor<2>)> {
        Some(self.scaled())
    }
}

impl RandomPair {
    /// `Λ_b·B` and `Λ_d·A`.
    fn scaled(&self) -> (Tensor<2>, Tensor<2>) {
        let rows = |vector: &Parameter| vector.value.clone().transpose();
        (self.b.clone() * rows(&self.lambda_b), self.a.clone() * rows(&self.lambda_d))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use burn::tensor::{Device, TensorData};

    #[test]
    fn the_change_by_hand() {
        let matrix = |v: Vec<f32>, dims| Tensor::<2>::from_data(TensorData::new(v, dims), &Device::flex());
        let vector = |v: Vec<f32>| Parameter::matrix("l", matrix(v.clone(), [1, v.len()]));
        let form = RandomPair {
            a: matrix(vec![1., 2., 3., 4.], [2, 2]),
            b: matrix(vec![1., 1., 0., 2.], [2, 2]),
            lambda_d: vector(vec![2., 0.5]),
            lambda_b: vector(vec![1., -1.]),
            dropout: 0.0,
        };
        // Λ_d·A = [[2, 4], [1.5, 2]], Λ_b·B = [[1, 1], [0, −2]].
        let dense: Vec<f32> = form.dense(&matrix(vec![0.; 4], [2, 2])).try_into_vec_as().unwrap();
        assert_eq!(dense, [3.5, 6., -3., -4.]);
        let (b, a) = form.factors().unwrap();
        assert_eq!(b.try_into_vec_as::<f32>().unwrap(), [1., 1., 0., -2.]);
        assert_eq!(a.try_into_vec_as::<f32>().unwrap(), [2., 4., 1.5, 2.]);
    }
}
