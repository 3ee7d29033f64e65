//! CorDA: context-oriented decomposition (Yang et al., arXiv 2406.05223).

use super::error::InitError;
use peft_core::adapter::{CordaMethod, InitialFactors};
use peft_core::linalg::{Matrix, Svd, spd_inverse, svd, top_svd};

/// What is added to the covariance's diagonal, as a share of its mean. PEFT doubles it until its f32 inverse is good to
/// 0.05; in f64 the first always is.
const DAMPING: f64 = 0.01;

/// With `C` the damped covariance of the module's inputs `[in, in]`: singular vectors `U`, `V` and values `S` of `W·C`,
/// the largest or the smallest ones, give `A = √(S/s)·Vᵀ·C⁻¹` and `B = U·√(S/s)`, taken out of the weight.
///
/// # Errors
/// [`InitError::ZeroInput`], and [`InitError::Decomposition`] if the rank is above the weight's dimensions.
pub fn corda(
    path: &str,
    weight: &Matrix,
    covariance: &Matrix,
    method: CordaMethod,
    rank: usize,
    scale: f64,
) -> Result<InitialFactors, InitError> {
    let wrong = InitError::decomposition(path, "corda");
    let [size, _] = covariance.dims();
    let mean = (0..size).map(|i| covariance.get(i, i)).sum::<f64>() / size.max(1) as f64;
    if mean <= 0.0 {
        return Err(InitError::ZeroInput { module: path.to_string(), init: "corda" });
    }
    let damped = Matrix::from_fn([size, size], |i, j| {
        covariance.get(i, j) + if i == j { DAMPING * mean } else { 0.0 }
    });
    let inverse = spd_inverse(&damped).map_err(&wrong)?;
    let product = weight.times(&damped).map_err(&wrong)?;
    let Svd { u, s, v } = match method {
        CordaMethod::Ipm => top_svd(&product, rank).map_err(&wrong)?,
        CordaMethod::Kpm => {
            // The smallest values need the accuracy of a decomposition that does not square.
            let all = svd(&product).map_err(&wrong)?;
            let count = all.s.len();
            let last = count.saturating_sub(rank)..count;
            Svd { u: all.u.columns(last.clone()), s: all.s[last.clone()].to_vec(), v: all.v.columns(last) }
        }
    };
    let roots: Vec<f64> = s.iter().map(|s| (s / scale).sqrt()).collect();
    let a = inverse.times(&v).map_err(&wrong)?.scale_columns(&roots).transpose();
    InitialFactors::taken_from(weight, &a, &u.scale_columns(&roots), scale).map_err(wrong)
}
