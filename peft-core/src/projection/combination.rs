//! The change `ΔW = s·B·A` whose factors are linear combinations of random matrices,
//!
//! ```text
//! A = A₀ + c·Σᵢ αᵢ·Aᵢ        B = c·Σⱼ βⱼ·Bⱼ
//! ```
//!
//! (NOLA, Koohpayegani et al., arXiv 2310.02556). Only the coefficients `α` and `β` are parameters. The factors are computed
//! from them once an update and stay until the next; their gradients are summed over the micro-batches of a step as those
//! of any low-rank change, and become the coefficients' once, at its end. So the random matrices are drawn twice a step,
//! however large it is, and never kept.

use super::{Form, Parameter, Tape};
use crate::kernels::{LowRankTerm, RandomBasis, Span, Term, Up, combinations, combinations_backward};
use burn::tensor::{DType, Tensor};
use std::collections::BTreeMap;

/// One factor `M = M₀ + c·Σᵢ aᵢ·Eᵢ`, `[rows, columns]`.
#[derive(Debug, Clone)]
pub struct CombinedFactor {
    /// The coefficients `a`, `[1, k]`, f32.
    pub coefficients: Parameter,
    span: Span,
    /// What the gradient of the value goes by.
    name: String,
    value: Tensor<2>,
}

impl CombinedFactor {
    /// The factor `[rows, columns]` with these coefficients of the elements of `basis`, each times `scale`, on top of the
    /// first element of the basis in `offset` times the number there. `name` is that of its value, different from all
    /// parameters'. The value is there once [`refresh`] has computed it.
    pub fn new(
        name: String,
        dims: [usize; 2],
        coefficients: Parameter,
        basis: RandomBasis,
        scale: f32,
        offset: Option<(RandomBasis, f32)>,
    ) -> Self {
        let value = Tensor::zeros(dims, (&coefficients.value.device(), DType::F32));
        Self { coefficients, span: Span { basis, scale, offset }, name, value }
    }

    /// What the gradient of `M` goes by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `M`.
    pub fn value(&self) -> &Tensor<2> {
        &self.value
    }
}

/// A low-rank change whose factors are combinations.
#[derive(Debug, Clone)]
pub struct Combination {
    /// `A`, `[r, in]`.
    pub a: CombinedFactor,
    /// `B`, `[out, r]`.
    pub b: CombinedFactor,
    /// `s`.
    pub scale: f64,
    /// Probability of dropping an input feature of the low-rank path in training.
    pub dropout: f64,
}

impl Form for Combination {
    fn parameters(&self) -> Vec<&Parameter> {
        vec![&self.a.coefficients, &self.b.coefficients]
    }

    fn parameters_mut(&mut self) -> Vec<&mut Parameter> {
        vec![&mut self.a.coefficients, &mut self.b.coefficients]
    }

    fn term(&self, tape: &Tape, path: &str, _weight: &Tensor<2>) -> Term {
        let read = |factor: &CombinedFactor| match factor.coefficients.trainable {
            true => tape.leaf(&factor.name, &factor.value),
            false => factor.value.clone(),
        };
        Term::LowRank(LowRankTerm {
            a: read(&self.a),
            b: Up::Matrix(read(&self.b)),
            bias: None,
            gain: None,
            scale: self.scale,
            dropout: tape.dropout(path, self.dropout),
        })
    }

    fn dense(&self, _weight: &Tensor<2>) -> Tensor<2> {
        self.b.value.clone().matmul(self.a.value.clone()).mul_scalar(self.scale)
    }

    fn factors(&self) -> Option<(Tensor<2>, Tensor<2>)> {
        Some((self.b.value.clone().mul_scalar(self.scale), self.a.value.clone()))
    }
}

/// Computes the factors of combinations from their coefficients: to be called whenever these have changed.
pub fn refresh<'a>(forms: impl Iterator<Item = &'a mut Combination>) {
    let factors: Vec<&mut CombinedFactor> = forms.flat_map(|form| [&mut form.a, &mut form.b]).collect();
    let wanted: Vec<_> =
        factors.iter().map(|factor| (factor.span, factor.coefficients.value.clone())).collect();
    for (factor, value) in factors.into_iter().zip(combinations(wanted)) {
        factor.value = value.reshape(factor.value.dims());
    }
}

/// Replaces the gradients of the factors, by name, with those of the coefficients.
pub fn pull_back<'a>(
    forms: impl Iterator<Item = &'a Combination>,
    gradients: &mut BTreeMap<String, Tensor<2>>,
) {
    let factors = forms.flat_map(|form| [&form.a, &form.b]);
    let (coefficients, of_factors): (Vec<&Parameter>, Vec<_>) = factors
        .filter_map(|factor| {
            let gradient = gradients.remove(&factor.name)?;
            Some((&factor.coefficients, (factor.span, gradient, factor.coefficients.numel())))
        })
        .unzip();
    for (coefficients, gradient) in coefficients.into_iter().zip(combinations_backward(of_factors)) {
        gradients.insert(coefficients.name.clone(), gradient);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::kernels::LinearInput;
    use crate::projection::{Delta, DropoutKey, Projection, project};
    use burn::tensor::{Device, TensorData};

    const SCALE: f64 = 1.5;
    const DIMS: [usize; 2] = [5, 7];
    const RANK: usize = 3;

    fn matrix(values: Vec<f32>, dims: [usize; 2]) -> Tensor<2> {
        Tensor::from_data(TensorData::new(values, dims), &Device::flex())
    }

    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| (((i + 31 * seed) * 7919 % 199) as f32 - 99.0) / 99.0).collect()
    }

    fn factor(part: &str, dims: [usize; 2], coefficients: Vec<f32>, offset: bool) -> CombinedFactor {
        let len = dims[0] * dims[1];
        let count = coefficients.len();
        let mut coefficients =
            Parameter::matrix(format!("{part}.coefficients"), matrix(coefficients, [1, count]));
        coefficients.trainable = true;
        let offset = offset.then(|| (RandomBasis::new(1, "offset", part, len), 0.5));
        CombinedFactor::new(
            part.to_string(),
            dims,
            coefficients,
            RandomBasis::new(1, "basis", part, len),
            0.25,
            offset,
        )
    }

    fn form(alpha: Vec<f32>, beta: Vec<f32>, offset: bool) -> Combination {
        let [rows, columns] = DIMS;
        let mut form = Combination {
            a: factor("a", [RANK, columns], alpha, offset),
            b: factor("b", [rows, RANK], beta, false),
            scale: SCALE,
            dropout: 0.0,
        };
        refresh(std::iter::once(&mut form));
        form
    }

    fn host(tensor: Tensor<2>) -> Vec<f32> {
        tensor.into_data().iter::<f32>().collect()
    }

    /// Rank 1 and one element each: `ΔW = s·(0.25·3·E_B)·(0.25·2·E_A + ½·E₀)`.
    #[test]
    fn one_element_by_hand() {
        let mut form = Combination {
            a: factor("a", [1, 2], vec![2.0], true),
            b: factor("b", [2, 1], vec![3.0], false),
            scale: SCALE,
            dropout: 0.0,
        };
        refresh(std::iter::once(&mut form));
        let e = |purpose: &str, part: &str| RandomBasis::new(1, purpose, part, 2).first_values(0, 2);
        let (e_a, e_b, e_0) = (e("basis", "a"), e("basis", "b"), e("offset", "a"));
        let dense = host(form.dense(&matrix(vec![0.0; 4], [2, 2])));
        for row in 0..2 {
            for column in 0..2 {
                let expected = 1.5 * (0.75 * e_b[row]) * (0.5 * e_a[column] + 0.5 * e_0[column]);
                assert!((dense[2 * row + column] - expected).abs() < 1e-6);
            }
        }
        let (b, a) = form.factors().unwrap();
        assert_eq!(host(b.matmul(a)).len(), 4);
    }

    /// A forward and a backward through the graph against the folded weight, and the coefficients' gradients against
    /// finite differences of the loss `⟨y, dy⟩`.
    #[test]
    fn gradients_of_coefficients_are_those_of_the_dense_change() {
        let (alpha, beta) = (numbers(11, 1), numbers(6, 2));
        let (x, dy) = (matrix(numbers(4 * 7, 3), [4, 7]), matrix(numbers(4 * 5, 4), [4, 5]));
        let projection = |alpha: &[f32], beta: &[f32]| Projection {
            path: "p".to_string(),
            weight: Parameter::matrix("w", matrix(numbers(35, 5), DIMS)),
            bias: None,
            delta: Some(Delta::Combination(form(alpha.to_vec(), beta.to_vec(), true))),
        };
        let here = projection(&alpha, &beta);
        let tape = Tape::recording(DropoutKey { seed: 0, step: 0, micro_batch: 0 });
        let leaf = x.clone().autodiff().require_grad();
        let y = project(&tape, &[&here], LinearInput::Plain(leaf.clone()), None);
        let weight = here.weight.value.clone();
        let folded = weight.clone() + here.delta.as_ref().unwrap().dense(&weight);
        let close = |found: Vec<f32>, expected: Vec<f32>| {
            assert!(found.iter().zip(&expected).all(|(f, e)| (f - e).abs() < 1e-5), "{found:?} {expected:?}");
        };
        close(host(y.clone().inner()), host(x.clone().matmul(folded.transpose())));

        let mut grads = (y * dy.clone().autodiff()).sum().backward();
        let mut gradients = tape.gradients(&mut grads);
        let Some(Delta::Combination(form)) = &here.delta else { unreachable!() };
        assert_eq!(gradients.keys().collect::<Vec<_>>(), ["a", "b"]);
        pull_back(std::iter::once(form), &mut gradients);
        assert_eq!(gradients.keys().collect::<Vec<_>>(), ["a.coefficients", "b.coefficients"]);

        let loss = |alpha: &[f32], beta: &[f32]| {
            let there = projection(alpha, beta);
            let y = project(&Tape::inference(), &[&there], LinearInput::Plain(x.clone()), None);
            host(y).iter().zip(host(dy.clone())).map(|(y, dy)| f64::from(*y) * f64::from(dy)).sum::<f64>()
        };
        // The loss is linear in each coefficient alone, so that a large step is exact.
        let moved = |values: &[f32], at: usize| {
            let mut values = values.to_vec();
            values[at] += 1.0;
            values
        };
        let before = loss(&alpha, &beta);
        let of_alpha = host(gradients["a.coefficients"].clone());
        let of_beta = host(gradients["b.coefficients"].clone());
        for (at, gradient) in of_alpha.iter().enumerate() {
            let difference = loss(&moved(&alpha, at), &beta) - before;
            assert!((f64::from(*gradient) - difference).abs() < 2e-5, "alpha {at}: {gradient} {difference}");
        }
        for (at, gradient) in of_beta.iter().enumerate() {
            let difference = loss(&alpha, &moved(&beta, at)) - before;
            assert!((f64::from(*gradient) - difference).abs() < 2e-5, "beta {at}: {gradient} {difference}");
        }
    }

    /// Together and alone, modules with one basis get the same bits.
    #[test]
    fn company_changes_nothing() {
        let mut forms: Vec<Combination> =
            (0..3).map(|i| form(numbers(9, i), numbers(9, i + 10), true)).collect();
        let alone: Vec<Vec<f32>> = forms.iter().map(|form| host(form.a.value().clone())).collect();
        refresh(forms.iter_mut());
        for (form, alone) in forms.iter().zip(&alone) {
            assert_eq!(host(form.a.value().clone()), *alone);
        }
        assert_ne!(alone[0], alone[1]);
    }

    #[test]
    fn what_does_not_train_has_no_leaf() {
        let mut form = form(numbers(2, 1), numbers(2, 2), false);
        form.parameters_mut().into_iter().for_each(|parameter| parameter.trainable = false);
        let tape = Tape::recording(DropoutKey { seed: 0, step: 0, micro_batch: 0 });
        let x = matrix(numbers(7, 3), [1, 7]);
        let Term::LowRank(term) = form.term(&tape, "p", &x) else { unreachable!() };
        let Up::Matrix(b) = term.b else { unreachable!() };
        assert!(!term.a.is_tracked() && !b.is_tracked());
    }
}
