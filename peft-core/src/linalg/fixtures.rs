//! What the tests of this folder share. Expected values come from `scripts/linalg_reference.py`.

use super::{Matrix, Svd};
use crate::random::Stream;

/// A 3 × 4 matrix.
pub(super) const NUMPY_MATRIX: [f32; 12] = [1., 1., 3., 0., -1., 0., -2., 1., 1., -2., 1., 2.];

/// Its left singular vectors.
#[rustfmt::skip]
pub(super) const NUMPY_U: [f64; 9] = [
    0.7796603198084664, 0.23528763838017408, 0.5803184582120754,
    -0.5411725562767675, -0.21309104398552411, 0.8134644868130557,
    0.31505880411286497, -0.9482784054267189, -0.038807418779550934,
];

/// Its singular values.
pub(super) const NUMPY_S: [f64; 3] = [4.082522232209227, 3.04615244574134, 1.0266291934391154];

/// Its right singular vectors.
#[rustfmt::skip]
pub(super) const NUMPY_V: [f64; 12] = [
    0.4007061289934112, -0.16410857039013382, -0.2648993902749951,
    0.03662998094729608, 0.6998482469956578, 0.6408675108557552,
    0.9152148264162379, 0.06032744616631576, 0.07326791670377783,
    0.021786789364483278, -0.692561482859581, 0.7167628331208117,
];

/// Entries drawn from a normal distribution.
pub(super) fn random(dims: [usize; 2], seed: u64) -> Matrix {
    let mut stream = Stream::new(seed, "linalg test", "", &[]);
    Matrix::from_fn(dims, |_, _| stream.normal())
}

/// The largest absolute difference of two entries.
pub(super) fn largest_difference(a: &Matrix, b: &Matrix) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let [rows, columns] = a.dims();
    let entries = (0..rows).flat_map(|i| (0..columns).map(move |j| (i, j)));
    entries.fold(0.0, |max, (i, j)| f64::max(max, (a.get(i, j) - b.get(i, j)).abs()))
}

/// The largest absolute entry of `QᵀQ − 1`.
pub(super) fn orthonormality(q: &Matrix) -> f64 {
    let gram = q.transpose_times(q).expect("the shapes fit");
    largest_difference(&gram, &Matrix::from_fn(gram.dims(), |i, j| f64::from(u8::from(i == j))))
}

/// `U·diag(s)·Vᵀ`.
pub(super) fn product(svd: &Svd) -> Matrix {
    svd.u.clone().scale_columns(&svd.s).times_transpose(&svd.v).expect("the shapes fit")
}

/// Requires row-major `expected` to 10⁻¹³.
pub(super) fn close(found: &Matrix, expected: &[f64]) {
    let [rows, columns] = found.dims();
    assert_eq!(rows * columns, expected.len());
    let expected = Matrix::from_fn(found.dims(), |i, j| expected[i * columns + j]);
    assert!(largest_difference(found, &expected) < 1e-13, "{found:?} for {expected:?}");
}
