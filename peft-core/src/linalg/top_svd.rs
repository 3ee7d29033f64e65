//! The largest singular values and vectors.

use super::eigen::symmetric_eigen;
use super::error::LinalgError;
use super::matrix::Matrix;
use super::svd::Svd;
use faer::linalg::matmul::triangular::{BlockStructure, matmul};
use faer::{Accum, Mat, Par};

/// The `rank` largest singular values and vectors of `matrix` `[m, n]`.
///
/// The left vectors are eigenvectors of `A·Aᵀ` (of `Aᵀ·A` if `m > n`), the right ones are `Aᵀ·U` made orthonormal.
/// Squaring costs half of f64's digits: a singular value is exact to about 10⁻⁸ of the largest one, which is f32's
/// accuracy of a decomposition that does not square.
///
/// # Errors
/// [`LinalgError::Rank`] if `rank` is above `min(m, n)`, [`LinalgError::NoConvergence`].
pub fn top_svd(matrix: &Matrix, rank: usize) -> Result<Svd, LinalgError> {
    matrix.require_rank(rank)?;
    let [rows, columns] = matrix.dims();
    if rows > columns {
        return Ok(top_svd(&matrix.transpose(), rank)?.transposed());
    }
    let mut gram = Mat::zeros(rows, rows);
    let (lower, full) = (BlockStructure::TriangularLower, BlockStructure::Rectangular);
    let (a, a_t) = (matrix.0.as_ref(), matrix.0.transpose());
    matmul(gram.as_mut(), lower, Accum::Replace, a, full, a_t, full, 1.0, Par::Seq);
    let eigen = symmetric_eigen(&Matrix(gram))?;
    let largest: Vec<usize> = (0..rank).map(|j| rows - 1 - j).collect();
    let u = eigen.vectors.select_columns(&largest);

    // Aᵀ·U = V·diag(s) up to rounding, and V stays orthonormal also where s vanishes.
    super::matrix::sequential();
    let qr = matrix.transpose_times(&u)?.0.qr();
    let diagonal: Vec<f64> = (0..rank).map(|j| qr.thin_R()[(j, j)]).collect();
    let signs: Vec<f64> = diagonal.iter().map(|d| d.signum()).collect();
    let v = Matrix(qr.compute_thin_Q()).scale_columns(&signs);
    let mut s: Vec<f64> = diagonal.iter().map(|d| d.abs()).collect();
    // Values that are equal to rounding may come in either order.
    for j in (1..rank).rev() {
        s[j - 1] = s[j - 1].max(s[j]);
    }
    Ok(Svd::new(u, s, v))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::fixtures::{
        NUMPY_MATRIX, NUMPY_S, NUMPY_U, NUMPY_V, close, largest_difference, orthonormality, product, random,
    };
    use super::super::svd;
    use super::*;

    #[test]
    fn values_are_numpys() {
        let a = Matrix::from_rows(&NUMPY_MATRIX, [3, 4]).unwrap();
        let top = top_svd(&a, 3).unwrap();
        assert!(top.s.iter().zip(NUMPY_S).all(|(a, b)| (a - b).abs() < 1e-14), "{:?}", top.s);
        close(&top.u, &NUMPY_U);
        close(&top.v, &NUMPY_V);
    }

    #[test]
    fn agrees_with_the_full_decomposition() {
        for dims in [[50, 20], [20, 50]] {
            let a = random(dims, 7);
            let (top, full) = (top_svd(&a, 6).unwrap(), svd(&a).unwrap());
            assert!(orthonormality(&top.u) < 1e-13 && orthonormality(&top.v) < 1e-13);
            assert!(top.s.iter().zip(&full.s).all(|(a, b)| (a - b).abs() < 1e-12));
            let full = Svd { u: full.u.columns(0..6), s: full.s[..6].to_vec(), v: full.v.columns(0..6) };
            assert!(largest_difference(&product(&top), &product(&full)) < 1e-11);
            // What is left over is as large as the next singular value.
            let whole = top_svd(&a, 20).unwrap();
            assert!(largest_difference(&product(&whole), &a) < 1e-12);
        }
    }

    #[test]
    fn values_over_many_orders_of_magnitude() {
        // A = U diag(10^-j) Vᵀ: down to 10⁻⁸ of the largest value all are found.
        let (u, v) =
            (top_svd(&random([30, 10], 8), 10).unwrap().u, top_svd(&random([40, 10], 9), 10).unwrap().u);
        let s: Vec<f64> = (0..10).map(|j| 10f64.powi(-j)).collect();
        let a = u.scale_columns(&s).times_transpose(&v).unwrap();
        let top = top_svd(&a, 10).unwrap();
        assert!(top.s.iter().zip(&s).all(|(a, b)| (a - b).abs() < 3e-8), "{:?}", top.s);
        assert!((top.s[4] - 1e-4).abs() < 1e-11);
        assert!(orthonormality(&top.v) < 1e-13);
        assert!(largest_difference(&product(&top), &a) < 3e-8);
    }

    #[test]
    fn without_full_rank() {
        let a = random([12, 2], 5).times(&random([2, 9], 6)).unwrap();
        let top = top_svd(&a, 5).unwrap();
        assert!(top.s[2] < 1e-7 * top.s[0]);
        assert!(orthonormality(&top.u) < 1e-13 && orthonormality(&top.v) < 1e-13);
        assert!(largest_difference(&product(&top), &a) < 1e-7);
        let zero = top_svd(&Matrix::from_rows(&[0.; 12], [3, 4]).unwrap(), 2).unwrap();
        assert_eq!(zero.s, [0.0; 2]);
        assert!(orthonormality(&zero.v) < 1e-15);
        assert!(matches!(top_svd(&a, 10), Err(LinalgError::Rank { rank: 10, max: 9, .. })));
    }
}
