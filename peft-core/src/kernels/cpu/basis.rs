//! Values of a random basis, on slices. The layout is pinned down in [`RandomBasis`](crate::kernels::RandomBasis).

use super::simd::{sum_by, vectorised};
use crate::random::philox_blocks;

/// Blocks of the generator side by side.
const LANES: usize = 16;
/// Values that the blocks of one group of lanes give: four words each, two values a word.
pub(in crate::kernels) const GROUP: usize = 8 * LANES;

/// A value from 16 bits, as a signed number: the middle of one of 2¹⁶ equal parts of (−1, 1), exact in f32.
#[inline(always)]
fn uniform(bits: i32) -> f32 {
    (bits as f32 + 0.5) * (1.0 / 32768.0)
}

vectorised! {
    /// The values of element `index` of the basis under `key` from the group `first` on; `out` is whole groups.
    pub(in crate::kernels) fn fill(key: [u32; 2], index: u32, first: u64, out: &mut [f32]) {
        for (group, out) in (first..).zip(out.as_chunks_mut::<GROUP>().0) {
            let block = group.wrapping_mul(LANES as u64);
            let low = std::array::from_fn(|lane| block | lane as u64);
            let words = philox_blocks(key, [low, [block >> 32; LANES], [u64::from(index); LANES], [0; LANES]]);
            for (word, out) in words.iter().zip(out.as_chunks_mut::<{ 2 * LANES }>().0) {
                for lane in 0..LANES {
                    let word = word[lane] as u32;
                    out[lane] = uniform((word << 16) as i32 >> 16);
                    out[LANES + lane] = uniform(word as i32 >> 16);
                }
            }
        }
    }

    /// `y ← y + factor·x`.
    pub(in crate::kernels) fn add_scaled(y: &mut [f32], factor: f32, x: &[f32]) {
        y.iter_mut().zip(x).for_each(|(y, x)| *y += factor * x);
    }

    /// `Σ aᵢ·bᵢ` over slices of one length.
    pub(in crate::kernels) fn dot(a: &[f32], b: &[f32]) -> f32 {
        sum_by(a, b, |a, b| a * b)
    }
}
