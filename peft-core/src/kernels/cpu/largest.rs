//! The first place of the largest value of each row.

use super::simd::{max, vectorised};
use rayon::prelude::*;

/// Values of a task.
const PIECE: usize = 1 << 14;

/// The places in `x`, rows of `columns`.
///
/// # Panics
/// When there are no columns.
pub(crate) fn largest(x: &[f32], columns: usize) -> Vec<i32> {
    assert!(columns > 0, "rows without columns have no largest value");
    let of_row = |row: &[f32]| {
        let pieces: Vec<f32> = row.par_chunks(PIECE).map(piece_max).collect();
        let largest = piece_max(&pieces);
        let piece = pieces.iter().position(|max| *max == largest).unwrap_or(0) * PIECE;
        let within = row[piece..].iter().position(|value| *value == largest).unwrap_or(0);
        (piece + within) as i32
    };
    x.par_chunks_exact(columns).map(of_row).collect()
}

vectorised! {
    fn piece_max(x: &[f32]) -> f32 {
        max(x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_equals_across_pieces() {
        let columns = 2 * PIECE + 5;
        let mut x = vec![0f32; 3 * columns];
        x[PIECE - 1] = 2.0;
        x[PIECE] = 2.0;
        x[columns + 2 * PIECE + 4] = 1.0;
        x[2 * columns..].fill(f32::NEG_INFINITY);
        assert_eq!(largest(&x, columns), [PIECE as i32 - 1, 2 * PIECE as i32 + 4, 0]);
        assert_eq!(largest(&[f32::NAN, f32::NAN], 2), [0]);
    }
}
