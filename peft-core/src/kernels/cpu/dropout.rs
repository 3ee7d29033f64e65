//! Dropout by place: see [`Dropout`].

use super::simd::vectorised;
use crate::kernels::dropout::Dropout;
use crate::random::philox_blocks;
use rayon::prelude::*;

/// Blocks of four random words drawn at a time.
const LANES: usize = 16;
/// Elements of a task, about.
const TASK: usize = 1 << 14;

/// `y = x ∘ mask`, or `y += x ∘ mask` where asked to `accumulate`.
///
/// # Shapes
/// Both `[rows, columns]`.
///
/// # Panics
/// When the slices differ in length.
pub(crate) fn apply(y: &mut [f32], x: &[f32], columns: usize, dropout: &Dropout, accumulate: bool) {
    assert_eq!(y.len(), x.len(), "as many elements as there were");
    if x.is_empty() {
        return;
    }
    let rows = (TASK / columns).max(1);
    y.par_chunks_mut(rows * columns).zip(x.par_chunks(rows * columns)).enumerate().for_each(
        |(task, (y, x))| {
            apply_rows(y, x, columns, task * rows, dropout, accumulate);
        },
    );
}

vectorised! {
    fn apply_rows(y: &mut [f32], x: &[f32], columns: usize, first: usize, dropout: &Dropout, accumulate: bool) {
        let (threshold, kept, key) = (dropout.threshold(), dropout.kept(), dropout.words());
        for (row, (y, x)) in y.chunks_mut(columns).zip(x.chunks(columns)).enumerate() {
            let row = (first + row) as u64;
            for (piece, (y, x)) in y.chunks_mut(4 * LANES).zip(x.chunks(4 * LANES)).enumerate() {
                let blocks = std::array::from_fn(|lane| (piece * LANES + lane) as u64);
                let words = philox_blocks::<LANES>(key, [blocks, [row; LANES], [0; LANES], [0; LANES]]);
                let mut factors = [0f32; 4 * LANES];
                for (word, lanes) in words.iter().enumerate() {
                    for (lane, random) in lanes.iter().enumerate() {
                        factors[4 * lane + word] = if (*random as u32) < threshold { 0.0 } else { kept };
                    }
                }
                let elements = y.iter_mut().zip(x).zip(&factors);
                match accumulate {
                    true => elements.for_each(|((y, x), factor)| *y += x * factor),
                    false => elements.for_each(|((y, x), factor)| *y = x * factor),
                }
            }
        }
    }
}
