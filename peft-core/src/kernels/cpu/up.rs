//! What stands for the `B` of a low-rank term, `[out, rank]`, and where its gradient `G` goes:
//!
//! ```text
//! [F B]·R − O                  dB = G·R₂ᵀ, with the rows of R that B's columns meet      dR = [F B]ᵀ·G
//! diag(outer)·B·diag(inner)    douter = Σᵢ G∘B∘inner by rows                             dinner = Σₒ G∘B∘outer by columns
//! ```

use super::buffers::{self, Buffer};
use super::matmul::{Matrix, MatrixMut, Update, matmul};
use crate::kernels::linear::Up;

/// The factor, `[out, rank]`.
pub(crate) fn value(up: &Up<&[f32]>, out: usize, rank: usize) -> Buffer {
    let mut value = buffers::take(out * rank);
    match *up {
        Up::Matrix(b) => value.copy_from_slice(b),
        Up::Core { b, core, frozen, offset } => {
            let own = columns(b, out);
            let split = rank - own;
            let (upper, lower) = core.split_at(split * rank);
            let mut add = |update, left, columns, core| {
                let into = MatrixMut::new(&mut value, out, rank);
                matmul(into, update, 1.0, Matrix::new(left, out, columns), Matrix::new(core, columns, rank));
            };
            add(Update::Replace, b, own, lower);
            if let Some(frozen) = frozen {
                add(Update::Accumulate, frozen, split, upper);
            }
            if let Some(offset) = offset {
                value.iter_mut().zip(offset).for_each(|(value, offset)| *value -= offset);
            }
        }
        Up::Scaled { b, outer, inner } => {
            let rows = value.chunks_exact_mut(rank.max(1)).zip(b.chunks_exact(rank.max(1)));
            for ((value, b), outer) in rows.zip(outer) {
                value.iter_mut().zip(b).zip(inner).for_each(|((value, b), inner)| *value = b * inner * outer);
            }
        }
    }
    value
}

/// Passes the factor's gradient `whole` on to what [`Up::trained`] names.
pub(crate) fn backward(up: &Up<&[f32]>, whole: &[f32], out: usize, rank: usize, to: [Option<&mut [f32]>; 2]) {
    let [first, second] = to;
    match *up {
        Up::Matrix(_) => {
            if let Some(first) = first {
                first.copy_from_slice(whole);
            }
        }
        Up::Core { b, core, frozen, .. } => {
            let own = columns(b, out);
            let split = rank - own;
            let whole = Matrix::new(whole, out, rank);
            if let Some(db) = first {
                let lower = Matrix::new(&core[split * rank..], own, rank);
                matmul(MatrixMut::new(db, out, own), Update::Replace, 1.0, whole, lower.t());
            }
            let Some(dcore) = second else { return };
            let (upper, lower) = dcore.split_at_mut(split * rank);
            let of_rows = |left, columns, to| {
                let left = Matrix::new(left, out, columns);
                matmul(MatrixMut::new(to, columns, rank), Update::Replace, 1.0, left.t(), whole);
            };
            of_rows(b, own, lower);
            if let Some(frozen) = frozen {
                of_rows(frozen, split, upper);
            }
        }
        Up::Scaled { b, outer, inner } => {
            let products = || whole.chunks_exact(rank.max(1)).zip(b.chunks_exact(rank.max(1)));
            if let Some(douter) = first {
                for (douter, (whole, b)) in douter.iter_mut().zip(products()) {
                    *douter = whole.iter().zip(b).zip(inner).map(|((g, b), inner)| g * b * inner).sum();
                }
            }
            if let Some(dinner) = second {
                dinner.fill(0.0);
                for ((whole, b), outer) in products().zip(outer) {
                    let terms = dinner.iter_mut().zip(whole).zip(b);
                    terms.for_each(|((dinner, g), b)| *dinner += g * b * outer);
                }
            }
        }
    }
}

/// Columns of a matrix of `rows` rows.
fn columns(matrix: &[f32], rows: usize) -> usize {
    matrix.len() / rows.max(1)
}
