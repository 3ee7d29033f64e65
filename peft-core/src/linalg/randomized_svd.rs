//! Randomised singular value decomposition (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1).

use super::error::LinalgError;
use super::matrix::{Matrix, sequential};
use super::svd::Svd;
use crate::random::Stream;

/// How much work goes into the random subspace.
#[derive(Debug, Clone, Copy)]
pub struct Sketch {
    /// Singular values wanted.
    pub rank: usize,
    /// Columns of the subspace beyond `rank`; cut where the matrix has no more.
    pub oversampling: usize,
    /// Rounds of multiplication with `A·Aᵀ`, orthonormalised after each product.
    pub power_iterations: usize,
}

/// About the `sketch.rank` largest singular values and vectors of `matrix` `[m, n]`: exactly those of the projection
/// of the matrix onto a subspace found by `q` = rank + oversampling random vectors and the power iterations.
///
/// The steps are those of `torch.svd_lowrank(matrix, q, niter)`. The `[min(m, n), q]` random matrix is filled row by
/// row from `stream` with standard normal numbers.
///
/// # Errors
/// [`LinalgError::Rank`] if the rank is above `min(m, n)`, [`LinalgError::NoConvergence`].
pub fn randomized_svd(matrix: &Matrix, sketch: Sketch, stream: &mut Stream) -> Result<Svd, LinalgError> {
    matrix.require_rank(sketch.rank)?;
    let [rows, columns] = matrix.dims();
    if rows < columns {
        return Ok(randomized_svd(&matrix.transpose(), sketch, stream)?.transposed());
    }
    let width = (sketch.rank + sketch.oversampling).min(columns);
    let random = Matrix::from_fn([columns, width], |_, _| stream.normal());
    let mut basis = orthonormal(&matrix.times(&random)?);
    for _ in 0..sketch.power_iterations {
        let back = orthonormal(&matrix.transpose_times(&basis)?);
        basis = orthonormal(&matrix.times(&back)?);
    }
    let small = super::svd(&basis.transpose_times(matrix)?)?;
    let kept = 0..sketch.rank;
    let u = basis.times(&small.u.columns(kept.clone()))?;
    Ok(Svd::new(u, small.s[kept.clone()].to_vec(), small.v.columns(kept)))
}

/// An orthonormal basis of the span of the columns.
fn orthonormal(matrix: &Matrix) -> Matrix {
    sequential();
    Matrix(matrix.0.qr().compute_thin_Q())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::fixtures::{close, largest_difference, orthonormality, product, random};
    use super::super::top_svd;
    use super::*;

    fn decompose(matrix: &Matrix, rank: usize, oversampling: usize, power_iterations: usize) -> Svd {
        let sketch = Sketch { rank, oversampling, power_iterations };
        randomized_svd(matrix, sketch, &mut Stream::new(1, "sketch", "", &[])).unwrap()
    }

    #[test]
    fn values_are_numpys_for_the_same_random_matrix() {
        // scripts/linalg_reference.py
        let a = Matrix::from_fn([5, 4], |i, j| ((7 * i + 3 * j) % 11) as f64 - 5.0);
        let found = decompose(&a, 2, 0, 1);
        assert!(found.s.iter().zip(RANDOMIZED_S).all(|(a, b)| (a - b).abs() < 1e-13), "{:?}", found.s);
        close(&found.u, &RANDOMIZED_U);
        close(&found.v, &RANDOMIZED_V);
        let wide = decompose(&a.transpose(), 2, 0, 1);
        assert!(largest_difference(&product(&wide), &product(&found).transpose()) < 1e-13);
    }

    const RANDOMIZED_S: [f64; 2] = [9.655432215380904, 7.934735748142549];
    #[rustfmt::skip]
    const RANDOMIZED_U: [f64; 10] = [
        -0.5471623306203284, -0.1814261461644735,
        0.5988251174120347, -0.11577336439316108,
        -0.15922784459600836, -0.4941080305577508,
        -0.014363193634485719, 0.8245878503650841,
        0.5625496021512417, -0.1720267791758749,
    ];
    #[rustfmt::skip]
    const RANDOMIZED_V: [f64; 8] = [
        0.49118994419965983, 0.7076117862041529,
        0.6444569496641401, -0.48798011060415725,
        -0.5417414107586984, -0.14145790031826141,
        -0.22343661878909193, 0.49107090538665743,
    ];

    #[test]
    fn iterations_and_oversampling_lead_to_the_largest_values() {
        let a = random([60, 40], 10);
        let exact = top_svd(&a, 5).unwrap();
        let error = |found: &Svd| largest_difference(&product(found), &product(&exact));
        let (rough, better) = (decompose(&a, 5, 0, 0), decompose(&a, 5, 10, 8));
        assert!(orthonormality(&better.u) < 1e-13 && orthonormality(&better.v) < 1e-13);
        assert!(error(&better) < 0.02 * error(&rough), "{} {}", error(&better), error(&rough));
        assert!(better.s.iter().zip(&exact.s).all(|(found, exact)| *found <= exact + 1e-12));
        // A subspace as wide as the matrix misses nothing.
        assert!(error(&decompose(&a, 5, 100, 0)) < 1e-12);
    }

    #[test]
    fn without_full_rank() {
        let a = random([12, 2], 5).times(&random([2, 9], 6)).unwrap();
        let found = decompose(&a, 4, 2, 3);
        assert!(found.s[2] < 1e-13 * found.s[0] && orthonormality(&found.v) < 1e-13);
        assert!(largest_difference(&product(&found), &a) < 1e-12);
        assert_eq!(decompose(&Matrix::from_rows(&[0.; 12], [3, 4]).unwrap(), 2, 1, 2).s, [0.0; 2]);
        let sketch = Sketch { rank: 10, oversampling: 0, power_iterations: 0 };
        assert!(randomized_svd(&a, sketch, &mut Stream::new(1, "", "", &[])).is_err());
    }
}
