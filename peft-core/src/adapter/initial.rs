//! Initial factors that are part of what a file means.
//!
//! PiSSA and OLoRA take the product of their first factors out of the base weight. The base that an adapter of theirs
//! belongs to is in no file: PEFT computes it again from the original weight, and so does this module. Their factors
//! are unique up to signs, and the product up to rounding.

use super::error::AdapterError;
use super::init::InitLoraWeights;
use crate::kernels::as_dtype;
use crate::linalg::{LinalgError, Matrix, qr, top_svd};
use crate::model::Decoder;
use crate::projection::{Delta, LowRank, Parameter, Projection, Removed};
use burn::tensor::{DType, Device, Tensor, TensorData};
use rayon::prelude::*;

/// First values of a low-rank change, and of the weight below it.
#[derive(Debug, Clone)]
pub struct InitialFactors {
    /// `A`, row-major `[r, in]`.
    pub a: Vec<f32>,
    /// `B`, row-major `[out, r]`.
    pub b: Vec<f32>,
    /// `W − s·B·A`, row-major `[out, in]`, where the factors are taken out of the weight.
    pub base: Option<Vec<f32>>,
}

impl InitialFactors {
    /// Factors `a` `[r, in]` and `b` `[out, r]` on top of the weight as it is.
    pub fn beside(a: &Matrix, b: &Matrix) -> Self {
        Self { a: a.to_rows(), b: b.to_rows(), base: None }
    }

    /// Factors `a` `[r, in]` and `b` `[out, r]` whose product is taken out of `weight` `[out, in]`.
    ///
    /// # Errors
    /// [`LinalgError::Shape`] if the shapes do not fit, [`LinalgError::NonFinite`] if the factors overflow f32.
    pub fn taken_from(weight: &Matrix, a: &Matrix, b: &Matrix, scale: f64) -> Result<Self, LinalgError> {
        let factors = Self::beside(a, b);
        // What is taken out is the product of the factors as they are kept, after their rounding.
        let a = Matrix::from_rows(&factors.a, a.dims())?;
        let b = Matrix::from_rows(&factors.b, b.dims())?;
        let base = weight.clone().minus(scale, &b.times(&a)?)?;
        Ok(Self { base: Some(base.to_rows()), ..factors })
    }
}

/// PiSSA (Meng et al., arXiv 2404.02948): the largest `rank` singular values and vectors of the weight,
/// `A = √(S/s)·Vᵀ` and `B = U·√(S/s)`, so that `s·B·A` is the best approximation of that rank.
///
/// # Errors
/// Those of [`top_svd`].
pub fn pissa(weight: &Matrix, rank: usize, scale: f64) -> Result<InitialFactors, LinalgError> {
    let svd = top_svd(weight, rank)?;
    let roots: Vec<f64> = svd.s.iter().map(|s| (s / scale).sqrt()).collect();
    let a = svd.v.scale_columns(&roots).transpose();
    InitialFactors::taken_from(weight, &a, &svd.u.scale_columns(&roots), scale)
}

/// OLoRA (Büyükakyüz, arXiv 2406.01775): the first `rank` columns of `Q` are `B`, the first rows of `R` are `A`. PEFT
/// does not divide the scale out of them, so `s·Q·R` is taken out of the weight.
///
/// # Errors
/// Those of [`qr`].
pub fn olora(weight: &Matrix, rank: usize, scale: f64) -> Result<InitialFactors, LinalgError> {
    let qr = qr(weight, rank)?;
    InitialFactors::taken_from(weight, &qr.r, &qr.q, scale)
}

/// Computes factors from weight, rank and scale.
pub(super) type FactorsOfWeight = fn(&Matrix, usize, f64) -> Result<InitialFactors, LinalgError>;

/// How the base is found that an adapter which started in this way belongs to, if it is not the base as it is.
pub(super) fn recomputed(init: InitLoraWeights) -> Option<FactorsOfWeight> {
    match init {
        InitLoraWeights::Pissa => Some(pissa),
        InitLoraWeights::Olora => Some(olora),
        _ => None,
    }
}

/// Where and how a change attaches.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Place {
    /// `r`.
    pub rank: usize,
    /// `s`.
    pub scale: f64,
    /// Dropout of the low-rank path's input.
    pub dropout: f64,
}

impl InitialFactors {
    /// Puts the factors onto a projection as its change. Where they are taken out of the weight, the weight becomes the
    /// rest, rounded to its own type.
    pub fn attach(self, projection: &mut Projection, place: Place, device: &Device) {
        let [rows, columns] = projection.dims();
        let tensor = |values: Vec<f32>, dims: [usize; 2]| {
            Tensor::<2>::from_data(TensorData::new(values, dims), (device, DType::F32))
        };
        let (a, b) = (tensor(self.a, [place.rank, columns]), tensor(self.b, [rows, place.rank]));
        let removed = self.base.is_some().then(|| Removed { a: a.clone(), b: b.clone() });
        if let Some(base) = self.base {
            let dtype = projection.weight.value.dtype();
            projection.weight.value = as_dtype(tensor(base, [rows, columns]), dtype);
        }
        let name = |factor: &str| format!("{}.{factor}.weight", projection.path);
        projection.delta = Some(Delta::LowRank(LowRank {
            a: Parameter::matrix(name("lora_A"), a),
            b: Parameter::matrix(name("lora_B"), b),
            bias: None,
            magnitude: None,
            scale: place.scale,
            dropout: place.dropout,
            removed,
        }));
    }
}

/// Puts a low-rank change with the values that `factors` computes from path, weight and place onto every projection
/// that `place` gives one.
///
/// Several weights are worked on at a time, one a thread, and no more are held on the host.
///
/// # Errors
/// The error of the first projection, in the model's order, that has one.
pub fn attach_factors<E: Send + From<AdapterError>>(
    model: &mut Decoder,
    place: impl Fn(&str) -> Option<Place>,
    factors: impl Fn(&str, &Matrix, Place) -> Result<InitialFactors, E> + Sync,
) -> Result<(), E> {
    let device = model.device.clone();
    let mut projections: Vec<_> = model
        .projections_mut()
        .filter_map(|projection| place(&projection.path).map(|place| (projection, place)))
        .collect();
    for group in projections.chunks_mut(rayon::current_num_threads().max(1)) {
        let weights: Vec<_> =
            group.iter().map(|(p, place)| (p.path.clone(), p.weight.to_host(), p.dims(), *place)).collect();
        let computed: Vec<Result<InitialFactors, E>> = weights
            .into_par_iter()
            .map(|(path, values, dims, place)| {
                let weight = Matrix::from_rows(&values, dims).map_err(|source| failed(&path, source))?;
                drop(values);
                factors(&path, &weight, place)
            })
            .collect();
        for ((projection, place), computed) in group.iter_mut().zip(computed) {
            computed?.attach(projection, *place, &device);
        }
    }
    Ok(())
}

/// The decomposition of the weight of the module at `path` failed.
pub(super) fn failed(path: &str, source: LinalgError) -> AdapterError {
    AdapterError::Decomposition { module: path.to_string(), source }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::random::Stream;

    fn weight(dims: [usize; 2]) -> Matrix {
        let mut stream = Stream::new(1, "weight", "", &[]);
        let values: Vec<f32> = (0..dims[0] * dims[1]).map(|_| stream.normal() as f32).collect();
        Matrix::from_rows(&values, dims).unwrap()
    }

    fn put_together(factors: &InitialFactors, dims: [usize; 2], rank: usize, scale: f64) -> Matrix {
        let a = Matrix::from_rows(&factors.a, [rank, dims[1]]).unwrap();
        let b = Matrix::from_rows(&factors.b, [dims[0], rank]).unwrap();
        let base = Matrix::from_rows(factors.base.as_ref().unwrap(), dims).unwrap();
        base.minus(-scale, &b.times(&a).unwrap()).unwrap()
    }

    #[test]
    fn rest_and_product_are_the_weight() {
        for dims in [[12, 20], [20, 12]] {
            let weight = weight(dims);
            for scale in [0.5, 1.0, 4.0] {
                for factors in [pissa(&weight, 4, scale).unwrap(), olora(&weight, 4, scale).unwrap()] {
                    let again = put_together(&factors, dims, 4, scale).to_rows();
                    let worst =
                        again.iter().zip(weight.to_rows()).fold(0f32, |max, (a, b)| max.max((a - b).abs()));
                    assert!(worst < 1e-6, "{dims:?} {scale}: {worst}");
                }
            }
        }
    }

    #[test]
    fn what_pissa_leaves_is_as_large_as_the_next_singular_value() {
        let weight = weight([12, 20]);
        let next = crate::linalg::svd(&weight).unwrap().s[4];
        for scale in [0.5, 4.0] {
            let rest = pissa(&weight, 4, scale).unwrap().base.unwrap();
            let largest = top_svd(&Matrix::from_rows(&rest, [12, 20]).unwrap(), 1).unwrap().s[0];
            assert!((largest - next).abs() < 1e-5, "{largest} {next}");
        }
    }

    #[test]
    fn oloras_b_is_orthonormal_and_too_high_a_rank_is_refused() {
        let weight = weight([12, 20]);
        let factors = olora(&weight, 4, 2.0).unwrap();
        let b = Matrix::from_rows(&factors.b, [12, 4]).unwrap();
        let gram = b.transpose_times(&b).unwrap();
        assert!((gram.get(0, 0) - 1.0).abs() < 1e-6 && gram.get(0, 1).abs() < 1e-6);
        assert!(pissa(&weight, 13, 1.0).is_err() && olora(&weight, 13, 1.0).is_err());
    }
}
