//! The balanced factors of a product.

use super::error::LinalgError;
use super::matrix::Matrix;
use super::{qr, svd};

/// Factors `(B', A')` with `B'·A' = b·a` whose columns and rows have equal lengths: with the decomposition `U·S·Vᵀ` of the
/// product, `B' = U·√S` and `A' = √S·Vᵀ`. `b` is `[m, r]` and `a` `[r, n]` with `r ≤ min(m, n)`.
///
/// The product itself is never built: `b = Q₁·R₁` and `aᵀ = Q₂·R₂`, and only `R₁·R₂ᵀ` is decomposed.
///
/// # Errors
/// [`LinalgError::Shape`] if the inner dimensions differ, [`LinalgError::Rank`] if they are too large,
/// [`LinalgError::NoConvergence`].
pub fn balanced(b: &Matrix, a: &Matrix) -> Result<(Matrix, Matrix), LinalgError> {
    let [_, rank] = b.dims();
    let left = qr(b, rank)?;
    let right = qr(&a.transpose(), rank)?;
    let core = svd(&left.r.times_transpose(&right.r)?)?;
    let roots: Vec<f64> = core.s.iter().map(|s| s.sqrt()).collect();
    let b = left.q.times(&core.u.scale_columns(&roots))?;
    let a = right.q.times(&core.v.scale_columns(&roots))?;
    Ok((b, a.transpose()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::fixtures::{largest_difference, random};
    use super::*;

    #[test]
    fn by_hand() {
        // [[8], [0]]·[[0, 2]] = [[0, 16], [0, 0]], whose singular value is 16.
        let b = Matrix::from_rows(&[8., 0.], [2, 1]).unwrap();
        let a = Matrix::from_rows(&[0., 2.], [1, 2]).unwrap();
        let (b, a) = balanced(&b, &a).unwrap();
        assert_eq!(b.times(&a).unwrap().to_rows(), [0., 16., 0., 0.]);
        assert_eq!((b.get(0, 0).abs(), a.get(0, 1).abs()), (4.0, 4.0));
    }

    #[test]
    fn the_product_stays_and_the_parts_are_alike() {
        for (dims, rank) in [([30, 20], 5), ([20, 30], 20)] {
            let (b, a) = (random([dims[0], rank], 1), random([rank, dims[1]], 2));
            let (b_2, a_2) = balanced(&b, &a).unwrap();
            assert!(largest_difference(&b_2.times(&a_2).unwrap(), &b.times(&a).unwrap()) < 1e-11);
            let (of_b, of_a) = (b_2.transpose_times(&b_2).unwrap(), a_2.times_transpose(&a_2).unwrap());
            assert!(largest_difference(&of_b, &of_a) < 1e-11);
        }
        assert!(balanced(&random([5, 2], 1), &random([3, 5], 2)).is_err());
        assert!(balanced(&random([3, 4], 1), &random([4, 9], 2)).is_err());
    }
}
