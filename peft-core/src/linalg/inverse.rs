//! The inverse of a symmetric positive definite matrix.

use super::error::LinalgError;
use super::matrix::{Matrix, sequential};
use faer::Side;
use faer::linalg::solvers::DenseSolveCore;

/// Inverts a symmetric positive definite matrix `[n, n]` by its Cholesky factor; only the lower triangle is read.
///
/// # Errors
/// [`LinalgError::Shape`] if it is not square, [`LinalgError::NotPositiveDefinite`] if it is not, to rounding.
pub fn spd_inverse(matrix: &Matrix) -> Result<Matrix, LinalgError> {
    let size = matrix.require_square()?;
    sequential();
    let failed = |_| LinalgError::NotPositiveDefinite { size };
    Ok(Matrix(matrix.0.llt(Side::Lower).map_err(failed)?.inverse()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::fixtures::{largest_difference, random};
    use super::*;

    #[test]
    fn by_hand_and_by_product() {
        let a = Matrix::from_rows(&[2., 1., 1., 2.], [2, 2]).unwrap();
        let expected = [2.0 / 3.0, -1.0 / 3.0, -1.0 / 3.0, 2.0 / 3.0];
        let inverse = spd_inverse(&a).unwrap();
        assert!(inverse.to_rows().iter().zip(expected).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-7));

        let a = random([30, 50], 2);
        let a = a.times_transpose(&a).unwrap();
        let identity = Matrix::from_fn([30, 30], |i, j| f64::from(u8::from(i == j)));
        assert!(largest_difference(&a.times(&spd_inverse(&a).unwrap()).unwrap(), &identity) < 1e-10);
    }

    #[test]
    fn what_has_no_inverse_is_refused() {
        let refused = |values: &[f32]| spd_inverse(&Matrix::from_rows(values, [2, 2]).unwrap());
        assert_eq!(refused(&[1., 2., 2., 1.]).unwrap_err(), LinalgError::NotPositiveDefinite { size: 2 });
        assert!(refused(&[0.; 4]).is_err());
        assert!(spd_inverse(&random([2, 3], 1)).is_err());
    }
}
