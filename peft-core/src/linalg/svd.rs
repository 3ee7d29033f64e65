//! Thin singular value decomposition.

use super::error::LinalgError;
use super::matrix::{Matrix, sequential};

/// `A = U·diag(s)·Vᵀ`, or the part of it that the largest singular values make.
///
/// Signs are fixed: the entry of each column of `V` that is largest in magnitude is positive.
#[derive(Debug, Clone)]
pub struct Svd {
    /// Left singular vectors, orthonormal columns, `[m, k]`.
    pub u: Matrix,
    /// Singular values, descending, not negative.
    pub s: Vec<f64>,
    /// Right singular vectors, orthonormal columns, `[n, k]`.
    pub v: Matrix,
}

impl Svd {
    /// Fixes the signs of `u` and `v`.
    pub(super) fn new(mut u: Matrix, s: Vec<f64>, mut v: Matrix) -> Self {
        for j in 0..s.len() {
            let column = v.0.col(j);
            // The first of equals, whatever rounding does to the others.
            let largest = column.iter().fold(0.0f64, |max, x| if x.abs() > max.abs() { *x } else { max });
            if largest < 0.0 {
                for matrix in [&mut u, &mut v] {
                    matrix.0.col_mut(j).iter_mut().for_each(|x| *x = -*x);
                }
            }
        }
        Self { u, s, v }
    }

    /// The decomposition of the transpose, with this one's signs chosen anew.
    pub(super) fn transposed(self) -> Self {
        Self::new(self.v, self.s, self.u)
    }
}

/// All `min(m, n)` singular values and vectors of `matrix` `[m, n]`, each to f64 accuracy relative to the largest.
///
/// [`top_svd`](super::top_svd) is several times faster where only the largest are wanted.
///
/// # Errors
/// [`LinalgError::NoConvergence`].
pub fn svd(matrix: &Matrix) -> Result<Svd, LinalgError> {
    let [rows, columns] = matrix.dims();
    sequential();
    let failed = |_| LinalgError::NoConvergence { what: "singular values", rows, columns };
    let svd = matrix.0.thin_svd().map_err(failed)?;
    let s = svd.S().column_vector().iter().copied().collect();
    Ok(Svd::new(Matrix(svd.U().to_owned()), s, Matrix(svd.V().to_owned())))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::fixtures::{
        NUMPY_MATRIX, NUMPY_S, NUMPY_U, NUMPY_V, close, largest_difference, orthonormality, product, random,
    };
    use super::*;

    #[test]
    fn values_are_numpys() {
        let svd = svd(&Matrix::from_rows(&NUMPY_MATRIX, [3, 4]).unwrap()).unwrap();
        assert!(svd.s.iter().zip(NUMPY_S).all(|(a, b)| (a - b).abs() < 1e-14), "{:?}", svd.s);
        close(&svd.u, &NUMPY_U);
        close(&svd.v, &NUMPY_V);
    }

    #[test]
    fn the_parts_give_the_matrix_back() {
        for dims in [[50, 20], [20, 50], [33, 33]] {
            let a = random(dims, 4);
            let svd = svd(&a).unwrap();
            assert!(svd.s.is_sorted_by(|a, b| a >= b));
            assert!(orthonormality(&svd.u) < 1e-13 && orthonormality(&svd.v) < 1e-13);
            assert!(largest_difference(&product(&svd), &a) < 1e-12);
        }
    }

    #[test]
    fn without_full_rank() {
        let a = random([12, 2], 5).times(&random([2, 9], 6)).unwrap();
        let some = svd(&a).unwrap();
        assert!(some.s[2] < 1e-14 * some.s[0] && orthonormality(&some.v) < 1e-13);
        let zero = svd(&Matrix::from_rows(&[0.; 12], [3, 4]).unwrap()).unwrap();
        assert_eq!(zero.s, [0.0; 3]);
        assert!(orthonormality(&zero.u) < 1e-15 && orthonormality(&zero.v) < 1e-15);
    }
}
