//! Eigenvalues and eigenvectors of a symmetric matrix.

use super::error::LinalgError;
use super::matrix::{Matrix, sequential};
use faer::Side;

/// `A = V·diag(values)·Vᵀ`.
#[derive(Debug, Clone)]
pub struct SymmetricEigen {
    /// Eigenvalues, ascending.
    pub values: Vec<f64>,
    /// Orthonormal eigenvectors, one a column in the values' order, `[n, n]`.
    pub vectors: Matrix,
}

/// Decomposes a symmetric matrix `[n, n]`, of which only the lower triangle is read.
///
/// # Errors
/// [`LinalgError::Shape`] if it is not square, [`LinalgError::NoConvergence`].
pub fn symmetric_eigen(matrix: &Matrix) -> Result<SymmetricEigen, LinalgError> {
    let size = matrix.require_square()?;
    sequential();
    let failed = |_| LinalgError::NoConvergence { what: "eigenvalues", rows: size, columns: size };
    let eigen = matrix.0.self_adjoint_eigen(Side::Lower).map_err(failed)?;
    let values = eigen.S().column_vector().iter().copied().collect();
    Ok(SymmetricEigen { values, vectors: Matrix(eigen.U().to_owned()) })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::fixtures::{largest_difference, orthonormality, random};
    use super::*;

    #[test]
    fn by_hand() {
        // The eigenvalues of [[2, 1], [1, 2]] are 1 and 3, along (1, −1)/√2 and (1, 1)/√2. The upper triangle is not read.
        let eigen = symmetric_eigen(&Matrix::from_rows(&[2., 9., 1., 2.], [2, 2]).unwrap()).unwrap();
        assert!((eigen.values[0] - 1.0).abs() < 1e-14 && (eigen.values[1] - 3.0).abs() < 1e-14);
        assert!((eigen.vectors.get(0, 1).abs() - 0.5f64.sqrt()).abs() < 1e-14);
    }

    #[test]
    fn the_parts_give_the_matrix_back() {
        let a = random([40, 40], 1);
        let a = a.times_transpose(&a).unwrap();
        let eigen = symmetric_eigen(&a).unwrap();
        assert!(eigen.values.is_sorted());
        assert!(orthonormality(&eigen.vectors) < 1e-13);
        let scaled = eigen.vectors.clone().scale_columns(&eigen.values);
        assert!(largest_difference(&scaled.times_transpose(&eigen.vectors).unwrap(), &a) < 1e-11);
        let zero = symmetric_eigen(&Matrix::from_rows(&[0.; 9], [3, 3]).unwrap()).unwrap();
        assert_eq!(zero.values, [0.0; 3]);
        assert!(symmetric_eigen(&random([3, 4], 1)).is_err());
    }
}
