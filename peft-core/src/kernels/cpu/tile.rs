//! Register tiles of a product: sums of `MR` rows and `NR` columns, or of twice as many where registers allow it, that
//! live in registers while the depth goes by. Every sum is made in the order of depth, whatever the tile.

use super::matmul::{MR, NR};
use super::simd::{has_avx2, has_avx512};

/// A register tile: up to two panels of the left operand by up to two of the right one.
pub(super) struct Tile {
    pub(super) depths: [usize; 2],
    pub(super) a: [*const f32; 2],
    /// Numbers from one panel of the left operand to the next.
    pub(super) a_panel: [usize; 2],
    pub(super) b: [*const f32; 2],
    /// Numbers from one panel of the right operand to the next.
    pub(super) b_panel: [usize; 2],
    /// Numbers from one depth to the next in a panel of the right operand.
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

/// What computes a tile, and how many rows and columns of one it can take.
#[derive(Clone, Copy)]
pub(super) struct TileFunction {
    /// # Safety
    /// The tile's pointers are good, and it has no more rows and columns than the function takes.
    pub(super) run: unsafe fn(&Tile),
    pub(super) rows: usize,
    pub(super) cols: usize,
}

/// The best for this CPU.
pub(super) fn tile_function() -> TileFunction {
    #[cfg(target_arch = "x86_64")]
    {
        if has_avx512() {
            return TileFunction { run: avx512::tile, rows: 2 * MR, cols: 2 * NR };
        }
        if has_avx2() {
            return TileFunction { run: avx2::tile, rows: MR, cols: NR };
        }
    }
    TileFunction { run: portable_tile, rows: MR, cols: NR }
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

    /// A tile of up to `2·MR` rows and `2·NR` columns.
    ///
    /// # Safety
    /// The CPU has AVX-512; the tile's pointers are good.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn tile(tile: &Tile) {
        // SAFETY: the caller's promise.
        unsafe {
            match (tile.rows > MR, tile.cols > NR) {
                (true, true) => panels::<2, 2>(tile),
                (true, false) => panels::<2, 1>(tile),
                (false, true) => panels::<1, 2>(tile),
                (false, false) => panels::<1, 1>(tile),
            }
        }
    }

    /// `R` panels of the left operand by `C` of the right one.
    ///
    /// # Safety
    /// As for the tile, which has so many panels.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn panels<const R: usize, const C: usize>(tile: &Tile) {
        const { assert!(NR == 16) };
        let masks = masks::<C>(tile);
        let mut sums = [[[_mm512_setzero_ps(); C]; MR]; R];
        // SAFETY: the caller's promise; beyond its columns nothing is read and nothing written.
        unsafe {
            for i in 0..tile.rows {
                for c in 0..C {
                    let result = tile.c.wrapping_add(i * tile.c_stride + c * NR);
                    _mm_prefetch::<_MM_HINT_ET0>(result.cast());
                }
            }
            stretch(tile, 0, &mut sums);
            if tile.depths[1] > 0 {
                stretch(tile, 1, &mut sums);
            }
            let alpha = _mm512_set1_ps(tile.alpha);
            for (i, sums) in sums.as_flattened().iter().enumerate().take(tile.rows) {
                for (c, sum) in sums.iter().enumerate() {
                    let mut value = _mm512_mul_ps(alpha, *sum);
                    if !tile.bias.is_null() {
                        let bias = tile.bias.wrapping_add(c * NR);
                        value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(masks[c], bias));
                    }
                    if !tile.source.is_null() {
                        let source = tile.source.wrapping_add(i * tile.source_stride + c * NR);
                        value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(masks[c], source));
                    }
                    let result = tile.c.wrapping_add(i * tile.c_stride + c * NR);
                    _mm512_mask_storeu_ps(result, masks[c], value);
                }
            }
        }
    }

    /// Which columns of each panel there are.
    #[inline]
    fn masks<const C: usize>(tile: &Tile) -> [__mmask16; C] {
        let mut masks = [0xFFFF; C];
        masks[C - 1] >>= C * NR - tile.cols;
        masks
    }

    /// Adds the products of stretch `s`: at most twenty-four sums, `C` vectors of `b` a depth, and each number of `a` `C`
    /// times, so that both FMA units stay busy.
    ///
    /// # Safety
    /// As for the tile.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn stretch<const R: usize, const C: usize>(
        tile: &Tile,
        s: usize,
        into: &mut [[[__m512; C]; MR]; R],
    ) {
        // A copy, so that it lives in registers.
        let mut sums = *into;
        let masks = masks::<C>(tile);
        let mut a: [*const f32; R] = std::array::from_fn(|r| tile.a[s].wrapping_add(r * tile.a_panel[s]));
        let mut b: [*const f32; C] = std::array::from_fn(|c| tile.b[s].wrapping_add(c * tile.b_panel[s]));
        let b_step = tile.b_step[s];
        for _ in 0..tile.depths[s] {
            // SAFETY: `MR` numbers of every panel of `a` are there at every depth, and what the masks say of `b`.
            unsafe {
                let mut row = [_mm512_setzero_ps(); C];
                for ((row, b), mask) in row.iter_mut().zip(b).zip(masks) {
                    // The right operand's first use comes from afar.
                    _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(16 * NR).cast());
                    *row = _mm512_maskz_loadu_ps(mask, b);
                }
                for (sums, a) in sums.iter_mut().zip(a) {
                    for (i, sums) in sums.iter_mut().enumerate() {
                        let number = _mm512_set1_ps(*a.wrapping_add(i));
                        for (sum, row) in sums.iter_mut().zip(row) {
                            *sum = _mm512_fmadd_ps(number, row, *sum);
                        }
                    }
                }
            }
            a = a.map(|a| a.wrapping_add(MR));
            b = b.map(|b| b.wrapping_add(b_step));
        }
        *into = sums;
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

    /// Every function that this CPU can run gives what the portable one gives, a panel by a panel, at every edge.
    #[test]
    fn tiles_agree() {
        let depths = [13, 7];
        let (a_panel, b_panel) = (20 * MR, 20 * NR);
        let (a, b) = (numbers(2 * a_panel, 4), numbers(2 * b_panel, 5));
        let (source, bias) = (numbers(2 * MR * 40, 6), numbers(2 * NR, 7));
        let run = |function: TileFunction, rows: usize, cols: usize| {
            let mut c = vec![7f32; 2 * MR * 40];
            for row in (0..rows).step_by(function.rows) {
                for col in (0..cols).step_by(function.cols) {
                    let (a, b) = (&a[row / MR * a_panel..], &b[col / NR * b_panel..]);
                    let tile = Tile {
                        depths,
                        a: [a.as_ptr(), a[13 * MR..].as_ptr()],
                        a_panel: [a_panel; 2],
                        b: [b.as_ptr(), b[13 * NR..].as_ptr()],
                        b_panel: [b_panel; 2],
                        b_step: [NR; 2],
                        rows: (rows - row).min(function.rows),
                        cols: (cols - col).min(function.cols),
                        c: c[row * 40 + col..].as_mut_ptr(),
                        c_stride: 40,
                        source: source[row * 40 + col..].as_ptr(),
                        source_stride: 40,
                        bias: bias[col..].as_ptr(),
                        alpha: 0.75,
                    };
                    // SAFETY: the slices hold two panels by two of twenty depths.
                    unsafe { (function.run)(&tile) };
                }
            }
            c
        };
        let mut functions = vec![tile_function()];
        #[cfg(target_arch = "x86_64")]
        if has_avx2() {
            functions.push(TileFunction { run: avx2::tile, rows: MR, cols: NR });
        }
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<u32>>();
        for (rows, cols) in [(12, 32), (12, 16), (6, 32), (6, 16), (11, 29), (7, 17), (5, 16), (6, 3), (1, 1)]
        {
            let plain = run(TileFunction { run: portable_tile, rows: MR, cols: NR }, rows, cols);
            let results = functions.iter().map(|function| run(*function, rows, cols)).collect::<Vec<_>>();
            for result in &results {
                for (fast, plain) in result.iter().zip(&plain) {
                    assert!((fast - plain).abs() < 1e-5, "{rows}×{cols}: {fast} where {plain}");
                }
                assert_eq!(
                    bits(result),
                    bits(&results[0]),
                    "{rows}×{cols}: vectors of two widths give other bytes"
                );
            }
        }
    }
}
