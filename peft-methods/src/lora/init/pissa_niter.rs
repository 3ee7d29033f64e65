//! PiSSA by a randomised decomposition (`pissa_niter_k`).

use super::error::InitError;
use peft_core::adapter::InitialFactors;
use peft_core::linalg::{Matrix, Sketch, randomized_svd};
use peft_core::random::Stream;

/// Columns of the random subspace beyond the rank. PEFT has none, which leaves the smallest of its values inexact.
const OVERSAMPLING: usize = 8;

/// PiSSA's factors (`peft_core::adapter::pissa`) from a decomposition with `iterations` power iterations: many times
/// faster for large weights, and as exact in its sum, since what is taken out of the weight is what the factors hold.
///
/// # Errors
/// [`InitError::Decomposition`] if the rank is above the weight's dimensions.
pub fn pissa_niter(
    path: &str,
    weight: &Matrix,
    rank: usize,
    scale: f64,
    iterations: usize,
    stream: &mut Stream,
) -> Result<InitialFactors, InitError> {
    let wrong = InitError::decomposition(path, "pissa_niter");
    let sketch = Sketch { rank, oversampling: OVERSAMPLING, power_iterations: iterations };
    let svd = randomized_svd(weight, sketch, stream).map_err(&wrong)?;
    let roots: Vec<f64> = svd.s.iter().map(|s| (s / scale).sqrt()).collect();
    let a = svd.v.scale_columns(&roots).transpose();
    InitialFactors::taken_from(weight, &a, &svd.u.scale_columns(&roots), scale).map_err(wrong)
}
