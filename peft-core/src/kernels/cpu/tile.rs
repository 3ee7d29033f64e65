//! Register tiles of a product: `MR` rows and `NR` columns of sums that live in registers while the depth goes by.

use super::matmul::{MR, NR};
use super::simd::{has_avx2, has_avx512};

/// A register tile.
pub(super) struct Tile {
    pub(super) depths: [usize; 2],
    pub(super) a: [*const f32; 2],
    pub(super) b: [*const f32; 2],
    pub(super) b_step: [usize; 2],
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) c: *mut f32,
    pub(super) c_stride: usize,
    pub(super) source: *const f32,
    pub(super) source_stride: usize,
    pub(super) bias: *const f32,
    pub(super) alpha: f32,
}

impl Tile {
    /// Writes sums of a tile, whole or cut by the edge of the results.
    ///
    /// # Safety
    /// The tile's pointers are good.
    unsafe fn store(&self, sums: &[[f32; NR]; MR]) {
        for (i, sums) in sums.iter().enumerate().take(self.rows) {
            for (j, sum) in sums.iter().enumerate().take(self.cols) {
                // SAFETY: inside the results.
                unsafe {
                    let mut value = self.alpha * sum;
                    if !self.bias.is_null() {
                        value += *self.bias.add(j);
                    }
                    if !self.source.is_null() {
                        value += *self.source.add(i * self.source_stride + j);
                    }
                    *self.c.add(i * self.c_stride + j) = value;
                }
            }
        }
    }
}

type TileFunction = unsafe fn(&Tile);

pub(super) fn tile_function() -> TileFunction {
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
        return avx2::tile;
    }
    portable_tile
}

/// Computes four whole tiles, two by two, to the same bytes as one after the other.
type FourFunction = unsafe fn([[Tile; 2]; 2]);

pub(super) fn four_function() -> Option<FourFunction> {
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        return Some(avx512::four);
    }
    None
}

/// The tile in code that compilers vectorise for any target.
///
/// # Safety
/// The tile's pointers are good.
unsafe fn portable_tile(tile: &Tile) {
    let mut sums = [[0f32; NR]; MR];
    // SAFETY: the caller's promise.
    unsafe {
        for s in 0..2 {
            for k in 0..tile.depths[s] {
                let a = tile.a[s].add(k * MR);
                let b = tile.b[s].add(k * tile.b_step[s]);
                let mut row = [0f32; NR];
                let width = if tile.b_step[s] == NR { NR } else { tile.cols };
                std::ptr::copy_nonoverlapping(b, row.as_mut_ptr(), width);
                for (i, sums) in sums.iter_mut().enumerate() {
                    for j in 0..NR {
                        sums[j] += *a.add(i) * row[j];
                    }
                }
            }
        }
        tile.store(&sums);
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{MR, NR, Tile};
    use std::arch::x86_64::*;

    /// Twenty-four accumulators, a row of a tile each: two vectors of `b` a depth, and each number of `a` twice.
    ///
    /// # Safety
    /// The CPU has AVX-512; the tiles are whole, of the same depths, and their pointers are good.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn four(tiles: [[Tile; 2]; 2]) {
        let mut sums = [[_mm512_setzero_ps(); 2]; 2 * MR];
        let [[corner, right], [below, _]] = &tiles;
        // SAFETY: the caller's promise; `NR` numbers fill a vector.
        unsafe {
            for s in 0..2 {
                let [mut a_0, mut a_1] = [corner.a[s], below.a[s]];
                let [mut b_0, mut b_1] = [corner.b[s], right.b[s]];
                for _ in 0..corner.depths[s] {
                    let (row_0, row_1) = (_mm512_loadu_ps(b_0), _mm512_loadu_ps(b_1));
                    for (i, sums) in sums.iter_mut().enumerate() {
                        let number = _mm512_set1_ps(if i < MR { *a_0.add(i) } else { *a_1.add(i - MR) });
                        sums[0] = _mm512_fmadd_ps(number, row_0, sums[0]);
                        sums[1] = _mm512_fmadd_ps(number, row_1, sums[1]);
                    }
                    (a_0, a_1) = (a_0.wrapping_add(MR), a_1.wrapping_add(MR));
                    (b_0, b_1) = (b_0.wrapping_add(corner.b_step[s]), b_1.wrapping_add(right.b_step[s]));
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                for (tile, sum) in tiles[i / MR].iter().zip(sums) {
                    let i = i % MR;
                    let mut value = _mm512_mul_ps(_mm512_set1_ps(tile.alpha), *sum);
                    if !tile.bias.is_null() {
                        value = _mm512_add_ps(value, _mm512_loadu_ps(tile.bias));
                    }
                    if !tile.source.is_null() {
                        value =
                            _mm512_add_ps(value, _mm512_loadu_ps(tile.source.add(i * tile.source_stride)));
                    }
                    _mm512_storeu_ps(tile.c.add(i * tile.c_stride), value);
                }
            }
        }
        const { assert!(NR == 16) };
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::{MR, NR, Tile};
    use std::arch::x86_64::*;

    /// Twelve accumulators, two vectors of `b` and one broadcast of `a` fill the registers; both FMA units stay busy.
    ///
    /// # Safety
    /// The CPU has AVX2 and FMA; the tile's pointers are good.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn tile(tile: &Tile) {
        // SAFETY: the caller's promise.
        unsafe {
            for i in 0..tile.rows {
                let row = tile.c.wrapping_add(i * tile.c_stride);
                _mm_prefetch::<_MM_HINT_T0>(row.cast());
                _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(NR - 1).cast());
            }
            let mut sums = [[_mm256_setzero_ps(); 2]; MR];
            stretch(tile, 0, &mut sums);
            if tile.depths[1] > 0 {
                stretch(tile, 1, &mut sums);
            }
            if tile.rows < MR || tile.cols < NR {
                let mut stored = [[0f32; NR]; MR];
                for (stored, sums) in stored.iter_mut().zip(&sums) {
                    _mm256_storeu_ps(stored.as_mut_ptr(), sums[0]);
                    _mm256_storeu_ps(stored.as_mut_ptr().add(8), sums[1]);
                }
                return tile.store(&stored);
            }
            let alpha = _mm256_set1_ps(tile.alpha);
            for (i, sums) in sums.iter().enumerate() {
                for (j, sum) in sums.iter().enumerate() {
                    let mut value = _mm256_mul_ps(alpha, *sum);
                    if !tile.bias.is_null() {
                        value = _mm256_add_ps(value, _mm256_loadu_ps(tile.bias.add(8 * j)));
                    }
                    if !tile.source.is_null() {
                        let source = tile.source.add(i * tile.source_stride + 8 * j);
                        value = _mm256_add_ps(value, _mm256_loadu_ps(source));
                    }
                    _mm256_storeu_ps(tile.c.add(i * tile.c_stride + 8 * j), value);
                }
            }
        }
    }

    /// Adds the products of stretch `s`.
    ///
    /// # Safety
    /// As for the tile.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn stretch(tile: &Tile, s: usize, into: &mut [[__m256; 2]; MR]) {
        // A copy, so that it lives in registers.
        let mut sums = *into;
        let (mut a, mut b, b_step, depth) = (tile.a[s], tile.b[s], tile.b_step[s], tile.depths[s]);
        macro_rules! step {
            ($a:expr, $b:expr) => {
                let (b_0, b_1) = (_mm256_loadu_ps($b), _mm256_loadu_ps($b.wrapping_add(8)));
                for i in 0..MR {
                    let a = _mm256_broadcast_ss(&*$a.wrapping_add(i));
                    sums[i][0] = _mm256_fmadd_ps(a, b_0, sums[i][0]);
                    sums[i][1] = _mm256_fmadd_ps(a, b_1, sums[i][1]);
                }
            };
        }
        // SAFETY: `MR` and `NR` numbers are there at every depth.
        unsafe {
            if b_step == NR {
                for _ in 0..depth / 4 {
                    step!(a, b);
                    step!(a.wrapping_add(MR), b.wrapping_add(NR));
                    step!(a.wrapping_add(2 * MR), b.wrapping_add(2 * NR));
                    step!(a.wrapping_add(3 * MR), b.wrapping_add(3 * NR));
                    a = a.wrapping_add(4 * MR);
                    b = b.wrapping_add(4 * NR);
                }
                for _ in 0..depth % 4 {
                    step!(a, b);
                    a = a.wrapping_add(MR);
                    b = b.wrapping_add(NR);
                }
            } else if tile.cols == NR {
                for _ in 0..depth {
                    step!(a, b);
                    a = a.wrapping_add(MR);
                    b = b.wrapping_add(b_step);
                }
            } else {
                // The edge of an operand in place: its last columns are read one by one.
                let mut row = [0f32; NR];
                for _ in 0..depth {
                    std::ptr::copy_nonoverlapping(b, row.as_mut_ptr(), tile.cols);
                    step!(a, row.as_ptr());
                    a = a.wrapping_add(MR);
                    b = b.wrapping_add(b_step);
                }
            }
        }
        *into = sums;
    }
}

#[cfg(test)]
mod tests {
    use super::super::matmul::tests::numbers;
    use super::*;

    /// The portable tile agrees with the one in use.
    #[test]
    fn portable_tile_agrees() {
        let (a, b) = (numbers(40 * MR, 4), numbers(40 * NR, 5));
        let run = |tile: TileFunction, rows, cols| {
            let mut c = vec![7f32; MR * 20];
            let bias = numbers(NR, 6);
            let half = 20;
            // SAFETY: the slices hold two stretches of twenty.
            unsafe {
                tile(&Tile {
                    depths: [half, half],
                    a: [a.as_ptr(), a[half * MR..].as_ptr()],
                    b: [b.as_ptr(), b[half * NR..].as_ptr()],
                    b_step: [NR, NR],
                    rows,
                    cols,
                    c: c.as_mut_ptr(),
                    c_stride: 20,
                    source: c.as_ptr(),
                    source_stride: 20,
                    bias: bias.as_ptr(),
                    alpha: 0.25,
                })
            }
            c
        };
        for (rows, cols) in [(6, 16), (5, 16), (6, 3), (1, 1)] {
            let (fast, plain) = (run(tile_function(), rows, cols), run(portable_tile, rows, cols));
            for (fast, plain) in fast.iter().zip(&plain) {
                assert!((fast - plain).abs() < 1e-5);
            }
        }
    }

    /// Where there is a function for four tiles, it gives what the tiles give alone, to the bit.
    #[test]
    fn four_tiles_are_the_tiles() {
        let Some(four) = four_function() else { return };
        let (a, b) = (numbers(2 * 20 * MR, 4), numbers(2 * 20 * NR, 5));
        let (source, bias) = (numbers(2 * MR * 40, 6), numbers(2 * NR, 7));
        let mut results = [(); 2].map(|()| vec![f32::NAN; 2 * MR * 40]);
        let tile = |c: &mut [f32], row: usize, col: usize| Tile {
            depths: [13, 7],
            a: [a[row * 20 * MR..].as_ptr(), a[(row * 20 + 13) * MR..].as_ptr()],
            b: [b[col * 20 * NR..].as_ptr(), b[(col * 20 + 13) * NR..].as_ptr()],
            b_step: [NR, NR],
            rows: MR,
            cols: NR,
            c: c[row * MR * 40 + col * NR..].as_mut_ptr(),
            c_stride: 40,
            source: source[row * MR * 40 + col * NR..].as_ptr(),
            source_stride: 40,
            bias: bias[col * NR..].as_ptr(),
            alpha: 0.75,
        };
        let [together, alone] = &mut results;
        // SAFETY: the slices hold two tiles by two of twenty depths.
        unsafe {
            four([0, 1].map(|row| [0, 1].map(|col| tile(together, row, col))));
            for (row, col) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                tile_function()(&tile(alone, row, col));
            }
        }
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<u32>>();
        assert_eq!(bits(together), bits(alone));
    }
}
