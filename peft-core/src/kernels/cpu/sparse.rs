//! Products with a sparse matrix in compressed rows, on tokens by the block.
//!
//! A block of tokens is laid out with its features as rows of [`LANES`] tokens, so that one entry of the matrix is one
//! multiplication of such rows, and the entries are read once a block instead of once a token.

use super::buffers::{Buffer, take};
use super::simd::{LANES, lane_sum, vectorised};
use rayon::prelude::*;

/// Entries of a task.
const CHUNK: usize = 512;

/// A matrix without its values: where each row starts among the entries (one more than there are rows), and the column
/// of each entry.
#[derive(Clone, Copy)]
pub(crate) struct CompressedRows<'a> {
    /// `[rows + 1]`, ascending.
    pub(crate) starts: &'a [u32],
    /// `[entries]`.
    pub(crate) columns: &'a [u32],
}

/// `[tokens, width]` as blocks of `[width, LANES]`; the last block is filled up with zeros.
pub(crate) struct TokenBlocks {
    values: Buffer,
    width: usize,
}

impl TokenBlocks {
    /// Of `values`, `[tokens, width]`.
    pub(crate) fn new(values: &[f32], width: usize) -> Self {
        let tokens = values.len() / width;
        let mut blocks = take(tokens.div_ceil(LANES) * width * LANES);
        let pairs = blocks.par_chunks_mut(width * LANES).zip(values.par_chunks(width * LANES));
        pairs.for_each(|(block, rows)| turn(block, rows, width));
        Self { values: blocks, width }
    }
}

vectorised! {
    fn turn(block: &mut [f32], rows: &[f32], width: usize) {
        if rows.len() < block.len() {
            block.fill(0.0);
        }
        for (token, row) in rows.chunks_exact(width).enumerate() {
            for (lanes, value) in block.chunks_exact_mut(LANES).zip(row) {
                lanes[token] = *value;
            }
        }
    }

    fn multiply_block(y: &mut [f32], x: &[f32], starts: &[u32], columns: &[u32], values: &[f32]) {
        let out = starts.len() - 1;
        for row in 0..out {
            let entries = starts[row] as usize..starts[row + 1] as usize;
            if entries.is_empty() {
                continue;
            }
            let mut sums = [0f32; LANES];
            for (column, value) in columns[entries.clone()].iter().zip(&values[entries]) {
                let lanes = &x[*column as usize * LANES..][..LANES];
                for (sum, x) in sums.iter_mut().zip(lanes) {
                    *sum += value * x;
                }
            }
            for (y, sum) in y.iter_mut().skip(row).step_by(out).zip(sums) {
                *y += sum;
            }
        }
    }

    fn sample_block(sums: &mut [[f32; LANES]], dy: &[f32], x: &[f32], rows: &[u32], columns: &[u32]) {
        for ((sums, row), column) in sums.iter_mut().zip(rows).zip(columns) {
            let dy = &dy[*row as usize * LANES..][..LANES];
            let x = &x[*column as usize * LANES..][..LANES];
            for ((sum, dy), x) in sums.iter_mut().zip(dy).zip(x) {
                *sum += dy * x;
            }
        }
    }

    fn sum_lanes(into: &mut [f32], sums: &[[f32; LANES]]) {
        for (into, sums) in into.iter_mut().zip(sums) {
            *into = lane_sum(*sums);
        }
    }
}

/// `y ← y + x·Mᵀ`: `y` `[tokens, rows of M]`, `x` of `[tokens, columns of M]`, `values` the entries of `M`.
///
/// # Panics
/// Where a column lies outside `x`, or the sizes do not agree.
pub(crate) fn multiply(y: &mut [f32], x: &TokenBlocks, matrix: CompressedRows, values: &[f32]) {
    let rows = matrix.starts.len() - 1;
    let pairs = y.par_chunks_mut(rows * LANES).zip(x.values.par_chunks(x.width * LANES));
    pairs.for_each(|(y, x)| multiply_block(y, x, matrix.starts, matrix.columns, values));
}

/// `products[j] = Σ_tokens dy[·, rows[j]]·x[·, columns[j]]`, without the other entries of `dyᵀ·x`.
///
/// # Panics
/// Where a row or column lies outside `dy` or `x`.
pub(crate) fn sampled_products(
    products: &mut [f32],
    dy: &TokenBlocks,
    x: &TokenBlocks,
    rows: &[u32],
    columns: &[u32],
) {
    let chunks = products.par_chunks_mut(CHUNK).zip(rows.par_chunks(CHUNK).zip(columns.par_chunks(CHUNK)));
    chunks.for_each(|(products, (rows, columns))| {
        let mut sums = [[0f32; LANES]; CHUNK];
        let sums = &mut sums[..products.len()];
        let blocks = dy.values.chunks_exact(dy.width * LANES).zip(x.values.chunks_exact(x.width * LANES));
        for (dy, x) in blocks {
            sample_block(sums, dy, x, rows, columns);
        }
        sum_lanes(products, sums);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_by_hand() {
        // M = [[0, 2, 0], [0, 0, 0], [1, 0, −1]], x = [[1, 2, 3], [4, 5, 6]].
        let matrix = CompressedRows { starts: &[0, 1, 1, 3], columns: &[1, 0, 2] };
        let x = TokenBlocks::new(&[1., 2., 3., 4., 5., 6.], 3);
        let mut y = [10., 0., 0., 0., 20., 0.];
        multiply(&mut y, &x, matrix, &[2., 1., -1.]);
        assert_eq!(y, [14., 0., -2., 10., 20., -2.]);

        let dy = TokenBlocks::new(&[1., 0., 2., -1., 0., 3.], 3);
        let mut products = [9.; 3];
        sampled_products(&mut products, &dy, &x, &[0, 2, 2], matrix.columns);
        assert_eq!(products, [2. - 5., 2. + 12., 6. + 18.]);
    }
}
