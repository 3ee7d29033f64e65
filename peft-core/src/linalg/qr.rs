//! Reduced QR decomposition.

use super::error::LinalgError;
use super::matrix::{Matrix, sequential};

/// `A[:, ..k] = Q·R[:, ..k]`, and `Q·R` is the projection of `A` onto the span of its first `k` columns.
#[derive(Debug, Clone)]
pub struct Qr {
    /// Orthonormal columns, `[m, k]`.
    pub q: Matrix,
    /// Zero below the diagonal, `[k, n]`.
    pub r: Matrix,
}

/// The first `k` columns of `Q` and rows of `R` of the QR decomposition of `matrix` `[m, n]`, by Householder
/// reflections.
///
/// Signs are LAPACK's, and so NumPy's and PyTorch's: each reflection sends a column to minus the sign of its head, so
/// the diagonal of `R` may be negative. `Q` is orthonormal also where columns of the matrix depend on each other, but
/// its columns there are arbitrary.
///
/// # Errors
/// [`LinalgError::Rank`] if `k` is above `min(m, n)`.
pub fn qr(matrix: &Matrix, k: usize) -> Result<Qr, LinalgError> {
    matrix.require_rank(k)?;
    sequential();
    // Only the first k columns decide about the first k reflections.
    let head = matrix.0.subcols(0, k).qr();
    let q = Matrix(head.compute_thin_Q());
    let mut r = q.transpose_times(matrix)?;
    for j in 0..k {
        for i in 0..k {
            r.0[(i, j)] = if i <= j { head.thin_R()[(i, j)] } else { 0.0 };
        }
    }
    Ok(Qr { q, r })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::fixtures::{NUMPY_MATRIX, close, largest_difference, orthonormality, random};
    use super::*;

    #[test]
    fn signs_and_values_are_numpys() {
        let a = Matrix::from_rows(&NUMPY_MATRIX, [3, 4]).unwrap();
        let Qr { q, r } = qr(&a, 3).unwrap();
        #[rustfmt::skip]
        close(&q, &[
            -0.5773502691896257, -0.6172133998483676, 0.5345224838248488,
            0.5773502691896257, 0.15430334996209188, 0.8017837257372731,
            -0.5773502691896257, 0.7715167498104596, 0.26726124191242445,
        ]);
        #[rustfmt::skip]
        close(&r, &[
            -1.7320508075688772, 0.5773502691896257, -3.4641016151377544, -0.5773502691896257,
            0.0, -2.1602468994692865, -1.3887301496588276, 1.697336849583011,
            0.0, 0.0, 0.26726124191242473, 1.3363062095621219,
        ]);
        // The first rows and columns do not depend on how many are asked for.
        let two = qr(&a, 2).unwrap();
        assert!(largest_difference(&two.q, &q.columns(0..2)) < 1e-15);
        assert!(largest_difference(&two.r, &r.rows(0..2)) < 1e-14);
    }

    #[test]
    fn the_parts_give_the_matrix_back() {
        for dims in [[50, 20], [20, 50], [33, 33]] {
            let a = random(dims, 3);
            let Qr { q, r } = qr(&a, dims[0].min(dims[1])).unwrap();
            assert!(orthonormality(&q) < 1e-13);
            assert!(largest_difference(&q.times(&r).unwrap(), &a) < 1e-12);
        }
    }

    #[test]
    fn dependent_columns() {
        let a = Matrix::from_fn([6, 4], |i, j| ((i + 1) * if j == 3 { 0 } else { j % 2 + 1 }) as f64);
        let Qr { q, r } = qr(&a, 4).unwrap();
        assert!(orthonormality(&q) < 1e-14);
        assert!(largest_difference(&q.times(&r).unwrap(), &a) < 1e-13);
        let zero = qr(&Matrix::from_rows(&[0.; 6], [3, 2]).unwrap(), 2).unwrap();
        assert!(orthonormality(&zero.q) < 1e-15 && zero.r.to_rows() == [0.; 4]);
        assert!(matches!(qr(&a, 5), Err(LinalgError::Rank { rank: 5, max: 4, .. })));
    }
}
