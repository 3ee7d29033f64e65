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
use crate::kernels::{LowRankTerm, RandomBasis, Term};
use burn::tensor::{DType, Tensor, TensorData};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// One factor `M = M₀ + c·Σᵢ aᵢ·Eᵢ`, `[rows, columns]`.
#[derive(Debug, Clone)]
pub struct CombinedFactor {
    /// The coefficients `a`, `[1, k]`, f32.
    pub coefficients: Parameter,
    basis: RandomBasis,
    scale: f32,
    offset: Option<(RandomBasis, f32)>,
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
        Self { coefficients, basis, scale, offset, name, value }
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

    fn term(&self, tape: &Tape, path: &str, x: &Tensor<2>, _weight: &Tensor<2>) -> Term {
        let read = |factor: &CombinedFactor| match factor.coefficients.trainable {
            true => tape.leaf(&factor.name, &factor.value),
            false => factor.value.clone(),
        };
        Term::LowRank(LowRankTerm {
            a: read(&self.a),
            b: read(&self.b),
            bias: None,
            gain: None,
            scale: self.scale,
            mask: tape.dropout_mask(path, self.dropout, x.dims(), &x.device().without_autodiff()),
        })
    }

    fn dense(&self, _weight: &Tensor<2>) -> Tensor<2> {
        self.b.value.clone().matmul(self.a.value.clone()).mul_scalar(self.scale)
    }

    fn factors(&self) -> Option<(Tensor<2>, Tensor<2>)> {
        Some((self.b.value.clone().mul_scalar(self.scale), self.a.value.clone()))
    }

    /// The mask of the dropout has its shape.
    fn reads_input(&self) -> bool {
        self.dropout > 0.0
    }
}

/// Computes the factors of combinations from their coefficients: to be called whenever these have changed.
pub fn refresh<'a>(forms: impl Iterator<Item = &'a mut Combination>) {
    combine(forms.flat_map(|form| [&mut form.a, &mut form.b]).collect());
}

/// Replaces the gradients of the factors, by name, with those of the coefficients.
pub fn pull_back<'a>(
    forms: impl Iterator<Item = &'a Combination>,
    gradients: &mut BTreeMap<String, Tensor<2>>,
) {
    let factors = forms.flat_map(|form| [&form.a, &form.b]);
    let wanted = factors.filter_map(|factor| Some((factor, gradients.remove(&factor.name)?))).collect();
    let groups: Vec<Vec<(&CombinedFactor, Tensor<2>)>> = grouped(wanted, |(factor, _)| factor);
    let found: Vec<Vec<(&Parameter, Vec<f32>)>> = groups
        .into_par_iter()
        .map(|group| {
            let (factors, matrices): (Vec<_>, Vec<_>) =
                group.into_iter().map(|(factor, gradient)| (factor, to_host(gradient))).unzip();
            let count = factors.first().map_or(0, |factor| factor.coefficients.numel());
            let products = factors[0].basis.products(&matrices, count);
            factors.iter().zip(products).map(|(factor, products)| {
                (&factor.coefficients, products.iter().map(|product| product * factor.scale).collect())
            }).collect()
        })
        .collect();
    for (coefficients, gradient) in found.into_iter().flatten() {
        let place = (&coefficients.value.device(), DType::F32);
        let data = TensorData::new(gradient, coefficients.value.dims());
        gradients.insert(coefficients.name.clone(), Tensor::from_data(data, place));
    }
}

/// Those with one basis together, so that its elements are drawn once for all of them.
fn grouped<T>(items: Vec<T>, factor: impl Fn(&T) -> &CombinedFactor) -> Vec<Vec<T>> {
    let mut groups: Vec<Vec<T>> = Vec::new();
    let mut numbers = std::collections::HashMap::new();
    for item in items {
        let of = factor(&item);
        let number = *numbers.entry((of.basis, of.coefficients.numel())).or_insert(groups.len());
        if number == groups.len() {
            groups.push(Vec::new());
        }
        groups[number].push(item);
    }
    groups
}

fn combine(factors: Vec<&mut CombinedFactor>) {
    grouped(factors, |factor| factor).into_par_iter().for_each(|mut group| {
        let coefficients: Vec<Vec<f32>> = group
            .iter()
            .map(|factor| factor.coefficients.to_host().iter().map(|a| a * factor.scale).collect())
            .collect();
        let sums = group[0].basis.combine(&coefficients);
        for (factor, mut sum) in group.iter_mut().zip(sums) {
            let dims = factor.value.dims();
            if let Some((basis, scale)) = factor.offset {
                let offset = basis.first_values(0, sum.len());
                sum.iter_mut().zip(offset).for_each(|(sum, offset)| *sum += offset * scale);
            }
            factor.value = Tensor::from_data(TensorData::new(sum, dims), (&factor.value.device(), DType::F32));
        }
    });
}

/// Row-major values.
fn to_host(tensor: Tensor<2>) -> Vec<f32> {
    let values = tensor.try_into_vec_as::<f32>();
    // burn reports a lost device nowhere else than here; no file or flag of a user's leads to it.
    values.expect("a gradient can be read back from its device")
}
