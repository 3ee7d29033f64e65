//! Learned factors on what goes into a linear map or comes out of it ((IA)³, Liu et al., arXiv 2205.05638, section 3.3):
//! `y = ((x ∘ l_in)·Wᵀ + b) ∘ l_out`, which is the map with the weight `l_outᵀ ∘ W ∘ l_in`.

use super::{Form, Parameter, Tape};
use crate::kernels::{Term, as_dtype};
use burn::tensor::{DType, Tensor};

/// Factors on the features of one or both sides.
#[derive(Debug, Clone)]
pub struct Gains {
    /// `l_in`, held as `[1, in]`.
    pub input: Option<Parameter>,
    /// `l_out`, held as `[1, out]`; the map's bias is scaled too.
    pub output: Option<Parameter>,
}

impl Form for Gains {
    fn parameters(&self) -> Vec<&Parameter> {
        self.input.iter().chain(&self.output).collect()
    }

    fn parameters_mut(&mut self) -> Vec<&mut Parameter> {
        self.input.iter_mut().chain(&mut self.output).collect()
    }

    fn term(&self, tape: &Tape, _path: &str, _weight: &Tensor<2>) -> Term {
        let read = |gain: &Option<Parameter>| gain.as_ref().map(|gain| tape.read(gain));
        Term::Gains { input: read(&self.input), output: read(&self.output) }
    }

    fn dense(&self, weight: &Tensor<2>) -> Tensor<2> {
        let weight = as_dtype(weight.clone(), DType::F32);
        let mut scaled = weight.clone();
        if let Some(input) = &self.input {
            scaled = scaled * input.value.clone();
        }
        if let Some(output) = &self.output {
            scaled = scaled * output.value.clone().transpose();
        }
        scaled - weight
    }

    fn bias_change(&self, bias: Option<&Tensor<2>>) -> Option<Tensor<2>> {
        let (bias, output) = bias.zip(self.output.as_ref())?;
        Some(bias.clone() * output.value.clone().sub_scalar(1.0))
    }

    fn is_additive(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use burn::tensor::{Device, TensorData};

    #[test]
    fn the_weight_of_both_gains_by_hand() {
        let matrix = |v: Vec<f32>, dims| Tensor::<2>::from_data(TensorData::new(v, dims), &Device::flex());
        let gain = |v: Vec<f32>| Some(Parameter::matrix("l", matrix(v.clone(), [1, v.len()])));
        let form = Gains { input: gain(vec![2., 0.5]), output: gain(vec![3., 1.]) };
        // [[1, 2], [4, 6]] becomes [[1·2·3, 2·½·3], [4·2, 6·½]].
        let weight = matrix(vec![1., 2., 4., 6.], [2, 2]);
        let dense: Vec<f32> = form.dense(&weight).try_into_vec_as().unwrap();
        assert_eq!(dense, [5., 1., 4., -3.]);
        let bias: Vec<f32> =
            form.bias_change(Some(&matrix(vec![10., 7.], [1, 2]))).unwrap().try_into_vec_as().unwrap();
        assert_eq!(bias, [20., 0.]);
        assert!(form.bias_change(None).is_none() && form.factors().is_none());
    }
}
