//! A dense matrix on the host.

use super::error::LinalgError;
use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};
use std::ops::Range;

/// A dense f64 matrix. Every entry is finite.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix(pub(super) Mat<f64>);

impl Matrix {
    /// The matrix `[rows, columns]` of row-major `values`.
    ///
    /// # Errors
    /// [`LinalgError::Length`] and [`LinalgError::NonFinite`].
    pub fn from_rows(values: &[f32], [rows, columns]: [usize; 2]) -> Result<Self, LinalgError> {
        if rows.checked_mul(columns) != Some(values.len()) {
            return Err(LinalgError::Length { found: values.len(), rows, columns });
        }
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            let (row, column) = (index / columns, index % columns);
            return Err(LinalgError::NonFinite { row, column, rows, columns, value: values[index] });
        }
        Ok(Self(Mat::from_fn(rows, columns, |i, j| f64::from(values[i * columns + j]))))
    }

    /// The matrix `[rows, columns]` with the entry `entry(row, column)`, drawn row by row.
    pub fn from_fn([rows, columns]: [usize; 2], mut entry: impl FnMut(usize, usize) -> f64) -> Self {
        let mut matrix = Mat::zeros(rows, columns);
        for i in 0..rows {
            for j in 0..columns {
                matrix[(i, j)] = entry(i, j);
            }
        }
        Self(matrix)
    }

    /// The entries, row-major, rounded to f32.
    pub fn to_rows(&self) -> Vec<f32> {
        let [rows, columns] = self.dims();
        let mut values = Vec::with_capacity(rows * columns);
        for i in 0..rows {
            values.extend((0..columns).map(|j| self.0[(i, j)] as f32));
        }
        values
    }

    /// `[rows, columns]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.0.nrows(), self.0.ncols()]
    }

    /// The entry in a row and a column.
    pub fn get(&self, row: usize, column: usize) -> f64 {
        self.0[(row, column)]
    }

    /// The transpose.
    pub fn transpose(&self) -> Self {
        Self(self.0.transpose().to_owned())
    }

    /// `self · other`.
    ///
    /// # Errors
    /// [`LinalgError::Shape`] if the inner dimensions differ.
    pub fn times(&self, other: &Self) -> Result<Self, LinalgError> {
        product(self.0.as_ref(), other.0.as_ref())
    }

    /// `selfᵀ · other`, without a transposed copy.
    ///
    /// # Errors
    /// [`LinalgError::Shape`] if the inner dimensions differ.
    pub fn transpose_times(&self, other: &Self) -> Result<Self, LinalgError> {
        product(self.0.transpose(), other.0.as_ref())
    }

    /// `self · otherᵀ`, without a transposed copy.
    ///
    /// # Errors
    /// [`LinalgError::Shape`] if the inner dimensions differ.
    pub fn times_transpose(&self, other: &Self) -> Result<Self, LinalgError> {
        product(self.0.as_ref(), other.0.transpose())
    }

    /// A copy of some rows.
    pub fn rows(&self, range: Range<usize>) -> Self {
        Self(self.0.subrows(range.start, range.len()).to_owned())
    }

    /// A copy of some columns.
    pub fn columns(&self, range: Range<usize>) -> Self {
        Self(self.0.subcols(range.start, range.len()).to_owned())
    }

    /// The columns with these numbers, in this order.
    pub fn select_columns(&self, numbers: &[usize]) -> Self {
        Self(Mat::from_fn(self.0.nrows(), numbers.len(), |i, j| self.0[(i, numbers[j])]))
    }

    /// Multiplies column `j` by `factors[j]`.
    pub fn scale_columns(mut self, factors: &[f64]) -> Self {
        for (j, factor) in factors.iter().enumerate() {
            for i in 0..self.0.nrows() {
                self.0[(i, j)] *= factor;
            }
        }
        self
    }

    /// `self − factor · other`.
    ///
    /// # Errors
    /// [`LinalgError::Shape`] if the shapes differ.
    pub fn minus(mut self, factor: f64, other: &Self) -> Result<Self, LinalgError> {
        let [rows, columns] = other.dims();
        if self.dims() != other.dims() {
            return Err(LinalgError::Shape { rows, columns, expected: "one of the other's shape" });
        }
        for j in 0..columns {
            for i in 0..rows {
                self.0[(i, j)] -= factor * other.0[(i, j)];
            }
        }
        Ok(self)
    }

    /// Refuses a rank above the smaller dimension.
    pub(super) fn require_rank(&self, rank: usize) -> Result<(), LinalgError> {
        let [rows, columns] = self.dims();
        match rows.min(columns) {
            max if rank > max => Err(LinalgError::Rank { rank, max, rows, columns }),
            _ => Ok(()),
        }
    }

    /// Refuses a matrix that is not square; returns its size.
    pub(super) fn require_square(&self) -> Result<usize, LinalgError> {
        match self.dims() {
            [rows, columns] if rows == columns => Ok(rows),
            [rows, columns] => Err(LinalgError::Shape { rows, columns, expected: "a square one" }),
        }
    }
}

fn product(left: MatRef<f64>, right: MatRef<f64>) -> Result<Matrix, LinalgError> {
    if left.ncols() != right.nrows() {
        let (rows, columns) = (right.nrows(), right.ncols());
        return Err(LinalgError::Shape { rows, columns, expected: "one with the other's inner dimension" });
    }
    let mut result = Mat::zeros(left.nrows(), right.ncols());
    matmul(result.as_mut(), Accum::Replace, left, right, 1.0, Par::Seq);
    Ok(Matrix(result))
}

/// Makes the solvers of the library below run on the calling thread: their blocking, and with it the last bits of a
/// result, would depend on the number of threads.
pub(super) fn sequential() {
    faer::set_global_parallelism(Par::Seq);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn products_by_hand() {
        let a = Matrix::from_rows(&[1., 2., 3., 4., 5., 6.], [2, 3]).unwrap();
        let b = Matrix::from_rows(&[1., 0., -1., 2., 1., 0.], [2, 3]).unwrap();
        assert_eq!(a.times_transpose(&b).unwrap().to_rows(), [-2., 4., -2., 13.]);
        assert_eq!(a.transpose_times(&b).unwrap().rows(0..1).to_rows(), [9., 4., -1.]);
        assert_eq!(a.times(&b.transpose()).unwrap().to_rows(), [-2., 4., -2., 13.]);
        assert_eq!(a.columns(1..3).to_rows(), [2., 3., 5., 6.]);
        assert_eq!(a.select_columns(&[2, 0]).scale_columns(&[2., 1.]).to_rows(), [6., 1., 12., 4.]);
        assert_eq!(a.clone().minus(2.0, &b).unwrap().to_rows(), [-1., 2., 5., 0., 3., 6.]);
        assert!(a.times(&b).is_err() && a.minus(1.0, &b.transpose()).is_err());
    }

    #[test]
    fn wrong_values_are_refused_where_they_enter() {
        let wrong = Matrix::from_rows(&[0., 0., 0., f32::NAN, 0., 0.], [2, 3]).unwrap_err();
        assert!(matches!(wrong, LinalgError::NonFinite { row: 1, column: 0, .. }), "{wrong}");
        assert!(matches!(Matrix::from_rows(&[0.; 5], [2, 3]), Err(LinalgError::Length { found: 5, .. })));
    }
}
