//! Matrix products, packed and blocked for the caches (Goto and van de Geijn, doi 10.1145/1356052.1356053; Van Zee and
//! van de Geijn, doi 10.1145/2764454).
//!
//! The left operand is packed in panels of [`MR`] rows, the right one in panels of [`NR`] columns, both depth by depth;
//! a tile of `MR × NR` results stays in registers over a stretch of depth. Every result is summed in the same order
//! wherever its tile lies and whoever computes it.

use super::buffers::{self, Buffer};
use super::simd::{has_avx2, sum_by};
use super::tile::{Tile, tile_function};
use rayon::prelude::*;
use std::ops::Range;

/// Rows of a register tile.
pub(super) const MR: usize = 6;
/// Columns of a register tile.
pub(super) const NR: usize = 16;
/// Depth of one pass over a register tile, at most: a panel of the right operand then fills a level-one cache.
const KC: usize = 512;
/// Panels of the left operand in a task: with `KC` they take a quarter of a level-two cache.
const PANELS: usize = 11;
/// Columns of results that wait between two passes, at most.
const GROUP: usize = 36 * NR;
/// Numbers of the right operand that are packed at a time (8 MiB).
const SLAB: usize = 2 << 20;
/// Depth that is packed at a time.
const SLAB_DEPTH: usize = 2048;
/// Products of at most this many rows read a right operand whose columns are contiguous in depth straight from memory.
const FEW_ROWS: usize = 8;
/// Products of at most this many rows read a right operand whose rows are contiguous without packing it.
const THIN_ROWS: usize = 8 * MR;

/// A view of a matrix: element `(i, j)` is `data[i·row_stride + j·col_stride]`.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// `[rows, cols]` with rows `row_stride` apart.
    ///
    /// # Panics
    /// When `data` is too short.
    pub(crate) fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || (rows - 1) * row_stride + cols <= data.len(), "a matrix beyond its data");
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// `[rows, cols]` without gaps.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// The transpose.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    fn at(&self, row: usize, col: usize) -> *const f32 {
        self.data.as_ptr().wrapping_add(row * self.row_stride + col * self.col_stride)
    }
}

/// A matrix to write, `[rows, cols]` with rows `row_stride` apart.
pub(crate) struct MatrixMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> MatrixMut<'a> {
    /// `[rows, cols]` with rows `row_stride` apart.
    ///
    /// # Panics
    /// When `data` is too short or rows overlap.
    pub(crate) fn strided(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(rows == 0 || (rows - 1) * row_stride + cols <= data.len(), "a matrix beyond its data");
        assert!(row_stride >= cols, "rows that overlap");
        Self { data, rows, cols, row_stride }
    }

    /// `[rows, cols]` without gaps.
    pub(crate) fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }
}

/// What becomes of the destination's values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Update {
    /// They are overwritten, and may be anything before.
    Replace,
    /// The product is added to them.
    Accumulate,
}

/// `dst ← [dst +] alpha · lhs · rhs`.
///
/// # Shapes
/// `dst` `[m, n]`, `lhs` `[m, k]`, `rhs` `[k, n]`.
///
/// # Panics
/// When the shapes do not fit together.
pub(crate) fn matmul(dst: MatrixMut, update: Update, alpha: f32, lhs: Matrix, rhs: Matrix) {
    let (m, n, depth) = (dst.rows, dst.cols, lhs.cols);
    assert!(lhs.rows == m && rhs.cols == n && rhs.rows == depth, "a product of shapes that do not fit");
    if m == 0 || n == 0 {
        return;
    }
    let stride = dst.row_stride;
    let out = Shared(dst.data.as_mut_ptr());
    if m <= FEW_ROWS && rhs.row_stride == 1 && lhs.col_stride == 1 {
        return few_rows(out, stride, update, alpha, lhs, rhs);
    }
    let accumulate = update == Update::Accumulate;
    if m <= THIN_ROWS && rhs.col_stride == 1 {
        return thin(out, stride, accumulate, alpha, lhs, rhs);
    }
    if depth == 0 {
        if !accumulate {
            dst.data.chunks_mut(stride).take(m).for_each(|row| row[..n].fill(0.0));
        }
        return;
    }
    for from in (0..depth).step_by(SLAB_DEPTH) {
        let part = from..depth.min(from + SLAB_DEPTH);
        let width = (SLAB / part.len()).max(1).next_multiple_of(NR);
        for left in (0..n).step_by(width) {
            let cols = left..n.min(left + width);
            let packed = pack_rhs(rhs, part.clone(), cols.clone());
            let adds = accumulate || from > 0;
            let (row_step, col_step) = task_shape(m, cols.len());
            let col_tasks = cols.len().div_ceil(col_step);
            (0..m.div_ceil(row_step) * col_tasks).into_par_iter().for_each(|task| {
                let rows = task / col_tasks * row_step..m.min((task / col_tasks + 1) * row_step);
                let at = task % col_tasks * col_step;
                let panel = lhs_panel(part.len());
                let mut a = buffers::take(panel_count(rows.len(), MR) * panel);
                pack_lhs(&mut a, panel, 0, lhs, rows.clone(), part.clone());
                // SAFETY: tasks write disjoint tiles of `dst`, inside it.
                unsafe {
                    let c = out.get().add(rows.start * stride + left + at);
                    Block {
                        rows: rows.len(),
                        cols: col_step.min(cols.len() - at),
                        first: Stretch::packed(part.len(), &a, panel, &packed[at / NR * part.len() * NR..]),
                        second: Stretch::NONE,
                        c,
                        c_stride: stride,
                        source: if adds { c } else { std::ptr::null() },
                        source_stride: stride,
                        bias: std::ptr::null(),
                        alpha,
                    }
                    .run();
                }
            });
        }
    }
}

/// Rows and columns of a task, multiples of `MR` and `NR`: enough tasks for the threads to share evenly, as few packings
/// of the left operand as that allows.
fn task_shape(rows: usize, cols: usize) -> (usize, usize) {
    let wanted = 4 * rayon::current_num_threads();
    let row_panels = panel_count(rows, MR);
    let row_tasks = row_panels.div_ceil(PANELS).next_multiple_of(2).min(row_panels);
    let col_panels = panel_count(cols, NR);
    let col_tasks = wanted.div_ceil(row_tasks).min(col_panels.div_ceil(4));
    (row_panels.div_ceil(row_tasks) * MR, col_panels.div_ceil(col_tasks) * NR)
}

/// Rows of a task where only rows are shared out, a multiple of `MR`.
pub(super) fn row_step(rows: usize) -> usize {
    let panels = panel_count(rows, MR);
    let tasks = panels.div_ceil(PANELS).next_multiple_of(2).max(2 * rayon::current_num_threads()).min(panels);
    panels.div_ceil(tasks.max(1)) * MR
}

/// Panels that `len` rows or columns take.
pub(super) fn panel_count(len: usize, width: usize) -> usize {
    len.div_ceil(width)
}

/// A pointer that tasks share, each for a part of its own.
#[derive(Clone, Copy)]
pub(super) struct Shared(pub(super) *mut f32);
// SAFETY: users write disjoint parts.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}
impl Shared {
    pub(super) fn get(self) -> *mut f32 {
        self.0
    }

    /// A part of what it points to.
    ///
    /// # Safety
    /// The part lies inside and no one else uses it.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn slice<'a>(self, from: usize, len: usize) -> &'a mut [f32] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(from), len) }
    }
}

// ---------------------------------------------------------------------------------------------------------- packing

/// Numbers of a panel of the left operand at `depth`, with room for what packing writes beyond its end.
pub(super) fn lhs_panel(depth: usize) -> usize {
    depth * MR + 8
}

/// Packs `rhs[depth, cols]` into panels of `NR` columns in parallel: `[panel][depth][NR]`, absent columns zero.
pub(super) fn pack_rhs(rhs: Matrix, depth: Range<usize>, cols: Range<usize>) -> Buffer {
    let panel = depth.len() * NR;
    let mut packed = buffers::take(panel_count(cols.len(), NR) * panel);
    if panel > 0 {
        packed.par_chunks_mut(panel).enumerate().with_min_len(4).for_each(|(i, packed)| {
            pack_rhs_panel(packed, rhs, depth.clone(), cols.start + i * NR..cols.end);
        });
    }
    packed
}

/// Packs the first `NR` columns of `cols`, `[depth][NR]`.
pub(super) fn pack_rhs_panel(packed: &mut [f32], rhs: Matrix, depth: Range<usize>, cols: Range<usize>) {
    let width = cols.len().min(NR);
    assert!(packed.len() >= depth.len() * NR && cols.start + width <= rhs.cols && depth.end <= rhs.rows);
    let source = rhs.at(depth.start, cols.start);
    // SAFETY: source and destination lie inside their slices by the line above.
    unsafe {
        pack_panel::<NR>(packed.as_mut_ptr(), source, width, depth.len(), rhs.col_stride, rhs.row_stride)
    }
}

/// Packs `lhs[rows, depth]` into panels of `MR` rows, `panel_stride` numbers apart, from `offset` in each:
/// `[panel][depth][MR]`, absent rows zero. Two numbers after the last depth may be overwritten, see [`lhs_panel`].
pub(super) fn pack_lhs(
    packed: &mut [f32],
    panel_stride: usize,
    offset: usize,
    lhs: Matrix,
    rows: Range<usize>,
    depth: Range<usize>,
) {
    let panels = panel_count(rows.len(), MR);
    assert!(lhs_panel(depth.len()) + offset <= panel_stride && panels * panel_stride <= packed.len());
    assert!(rows.end <= lhs.rows && depth.end <= lhs.cols);
    for (i, row) in rows.clone().step_by(MR).enumerate() {
        let width = (rows.end - row).min(MR);
        // SAFETY: inside their slices by the lines above; two numbers beyond a panel are allowed for.
        unsafe {
            pack_panel::<MR>(
                packed.as_mut_ptr().add(i * panel_stride + offset),
                lhs.at(row, depth.start),
                width,
                depth.len(),
                lhs.row_stride,
                lhs.col_stride,
            )
        }
    }
}

/// Writes `[depth][P]` from `width ≤ P` lines of a matrix, `line` apart, whose elements are `step` apart in depth.
///
/// # Safety
/// The source holds what is read; the destination holds `depth · P` numbers and two more.
unsafe fn pack_panel<const P: usize>(
    packed: *mut f32,
    source: *const f32,
    width: usize,
    depth: usize,
    line: usize,
    step: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        if line == 1 && width == P {
            for k in 0..depth {
                std::ptr::copy_nonoverlapping(source.add(k * step), packed.add(k * P), P);
            }
            return;
        }
        let mut from = 0;
        #[cfg(target_arch = "x86_64")]
        if step == 1 && width == P && has_avx2() {
            from = avx2::pack_transposed::<P>(packed, source, depth, line);
        }
        for k in from..depth {
            for i in 0..width {
                *packed.add(k * P + i) = *source.add(i * line + k * step);
            }
            for i in width..P {
                *packed.add(k * P + i) = 0.0;
            }
        }
    }
}

// --------------------------------------------------------------------------------------------------- register tiles

/// A stretch of depth: where its panels lie.
#[derive(Clone, Copy)]
pub(super) struct Stretch {
    /// Its length.
    pub(super) depth: usize,
    /// Packed panels of the left operand.
    pub(super) a: *const f32,
    /// Numbers from one panel to the next.
    pub(super) a_panel: usize,
    /// The right operand.
    pub(super) b: *const f32,
    /// Numbers from one of its panels to the next.
    pub(super) b_panel: usize,
    /// Numbers from one depth to the next within a panel of it.
    pub(super) b_step: usize,
}

impl Stretch {
    /// Nothing.
    pub(super) const NONE: Self =
        Self { depth: 0, a: std::ptr::null(), a_panel: 0, b: std::ptr::null(), b_panel: 0, b_step: 0 };

    /// Both operands packed, the right one at this very depth.
    pub(super) fn packed(depth: usize, a: &[f32], a_panel: usize, b: &[f32]) -> Self {
        Self { depth, a: a.as_ptr(), a_panel, b: b.as_ptr(), b_panel: depth * NR, b_step: NR }
    }
}

/// A block of results, `c ← source + bias + alpha · (a₁·b₁ + a₂·b₂)`, computed by one thread.
pub(super) struct Block {
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// The first product.
    pub(super) first: Stretch,
    /// A second product in the same pass over the results: a low-rank term.
    pub(super) second: Stretch,
    pub(super) c: *mut f32,
    pub(super) c_stride: usize,
    /// Added to the product, or null; may be `c`.
    pub(super) source: *const f32,
    pub(super) source_stride: usize,
    /// A row added to every row, or null.
    pub(super) bias: *const f32,
    pub(super) alpha: f32,
}

impl Block {
    /// No rows, no operands, `alpha` one: what a block is built from.
    pub(super) const EMPTY: Self = Self {
        rows: 0,
        cols: 0,
        first: Stretch::NONE,
        second: Stretch::NONE,
        c: std::ptr::null_mut(),
        c_stride: 0,
        source: std::ptr::null(),
        source_stride: 0,
        bias: std::ptr::null(),
        alpha: 1.0,
    };

    /// Computes it.
    ///
    /// # Safety
    /// All pointers are good for what the sizes say, and `c` is this thread's alone. A right operand with a `b_step`
    /// other than `NR` is read `NR` columns at a time only where it has them.
    pub(super) unsafe fn run(&self) {
        let tile = tile_function();
        let passes = self.first.depth.div_ceil(KC).max(1);
        let step = self.first.depth.div_ceil(passes);
        // Results wait for the next pass in a level-two cache.
        let groups = if passes > 1 { self.cols.div_ceil(GROUP) } else { 1 };
        let group = self.cols.div_ceil(groups.max(1)).next_multiple_of(tile.cols).max(tile.cols);
        for left in (0..self.cols).step_by(group) {
            let end = self.cols.min(left + group);
            for pass in 0..passes {
                let stretch = pass * step..self.first.depth.min((pass + 1) * step);
                for col in (left..end).step_by(tile.cols) {
                    for row in (0..self.rows).step_by(tile.rows) {
                        let size = (tile.rows.min(self.rows - row), tile.cols.min(end - col));
                        let at = self.tile((row, col), size, stretch.clone(), pass == 0, pass + 1 == passes);
                        // SAFETY: the caller's promise.
                        unsafe { (tile.run)(&at) };
                    }
                }
            }
        }
    }

    /// The tile of `size` at `(row, col)` over `stretch` of the first product.
    #[inline]
    fn tile(
        &self,
        (row, col): (usize, usize),
        (rows, cols): (usize, usize),
        stretch: Range<usize>,
        first_pass: bool,
        last_pass: bool,
    ) -> Tile {
        let (i, j) = (row / MR, col / NR);
        let [first, second] = [&self.first, &self.second];
        let (source, source_stride) = match first_pass {
            true => (self.source, self.source_stride),
            false => (self.c.cast_const(), self.c_stride),
        };
        Tile {
            depths: [stretch.len(), if last_pass { second.depth } else { 0 }],
            a: [
                first.a.wrapping_add(i * first.a_panel + stretch.start * MR),
                second.a.wrapping_add(i * second.a_panel),
            ],
            a_panel: [first.a_panel, second.a_panel],
            b: [
                first.b.wrapping_add(j * first.b_panel + stretch.start * first.b_step),
                second.b.wrapping_add(j * second.b_panel),
            ],
            b_panel: [first.b_panel, second.b_panel],
            b_step: [first.b_step, second.b_step],
            rows,
            cols,
            c: self.c.wrapping_add(row * self.c_stride + col),
            c_stride: self.c_stride,
            source: match source.is_null() {
                true => source,
                false => source.wrapping_add(row * source_stride + col),
            },
            source_stride,
            bias: match self.bias.is_null() || !first_pass {
                true => std::ptr::null(),
                false => self.bias.wrapping_add(col),
            },
            alpha: self.alpha,
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    /// Products of `M` rows with two lines over `depth` numbers, a multiple of sixteen.
    ///
    /// # Safety
    /// The CPU has AVX2 and FMA; the lines are as long as `depth`.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn dots<const M: usize>(
        rows: [*const f32; 4],
        lines: [*const f32; 2],
        depth: usize,
    ) -> [[f32; 2]; 4] {
        let mut sums = [[[_mm256_setzero_ps(); 2]; 2]; M];
        for k in (0..depth).step_by(16) {
            for half in 0..2 {
                let k = k + 8 * half;
                // Few rows need both sets of sums to keep the units busy; more would spill them.
                let set = if M > 2 { 0 } else { half };
                // SAFETY: below `depth`.
                unsafe {
                    let line = lines.map(|line| _mm256_loadu_ps(line.add(k)));
                    for r in 0..M {
                        let row = _mm256_loadu_ps(rows[r].add(k));
                        sums[r][0][set] = _mm256_fmadd_ps(row, line[0], sums[r][0][set]);
                        sums[r][1][set] = _mm256_fmadd_ps(row, line[1], sums[r][1][set]);
                    }
                }
            }
        }
        let mut together = [_mm256_setzero_ps(); 8];
        for r in 0..M {
            for c in 0..2 {
                together[2 * r + c] = _mm256_add_ps(sums[r][c][0], sums[r][c][1]);
            }
        }
        let dots = lane_sums(together);
        std::array::from_fn(|r| [dots[2 * r], dots[2 * r + 1]])
    }

    /// The sum of the lanes of each.
    #[target_feature(enable = "avx2,fma")]
    fn lane_sums(v: [__m256; 8]) -> [f32; 8] {
        let pairs =
            |i: usize| _mm256_hadd_ps(_mm256_hadd_ps(v[i], v[i + 1]), _mm256_hadd_ps(v[i + 2], v[i + 3]));
        let (first, second) = (pairs(0), pairs(4));
        let low = _mm256_permute2f128_ps::<0x20>(first, second);
        let high = _mm256_permute2f128_ps::<0x31>(first, second);
        let mut sums = [0f32; 8];
        // SAFETY: eight numbers.
        unsafe { _mm256_storeu_ps(sums.as_mut_ptr(), _mm256_add_ps(low, high)) };
        sums
    }

    /// Packs `P` full lines, contiguous in depth, eight depths at a time; returns how many depths it did.
    ///
    /// # Safety
    /// The CPU has AVX2; `P · depth + 2` numbers are writable, the lines readable.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn pack_transposed<const P: usize>(
        packed: *mut f32,
        source: *const f32,
        depth: usize,
        line: usize,
    ) -> usize {
        let whole = depth / 8 * 8;
        for k in (0..whole).step_by(8) {
            for group in (0..P).step_by(8) {
                let mut lines = [_mm256_setzero_ps(); 8];
                for (i, l) in lines.iter_mut().enumerate().take(P - group) {
                    // SAFETY: the lines are readable.
                    *l = unsafe { _mm256_loadu_ps(source.add((group + i) * line + k)) };
                }
                for (i, column) in transpose(lines).into_iter().enumerate() {
                    // SAFETY: writable; where P < 8 the next store mends what this one writes too far.
                    unsafe { _mm256_storeu_ps(packed.add((k + i) * P + group), column) };
                }
            }
        }
        whole
    }

    /// Transposes eight rows of eight.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn transpose(r: [__m256; 8]) -> [__m256; 8] {
        let pairs: [__m256; 8] = [
            _mm256_unpacklo_ps(r[0], r[1]),
            _mm256_unpackhi_ps(r[0], r[1]),
            _mm256_unpacklo_ps(r[2], r[3]),
            _mm256_unpackhi_ps(r[2], r[3]),
            _mm256_unpacklo_ps(r[4], r[5]),
            _mm256_unpackhi_ps(r[4], r[5]),
            _mm256_unpacklo_ps(r[6], r[7]),
            _mm256_unpackhi_ps(r[6], r[7]),
        ];
        let low = |a, b| _mm256_shuffle_ps::<0x44>(a, b);
        let high = |a, b| _mm256_shuffle_ps::<0xEE>(a, b);
        let quads = [
            low(pairs[0], pairs[2]),
            high(pairs[0], pairs[2]),
            low(pairs[1], pairs[3]),
            high(pairs[1], pairs[3]),
            low(pairs[4], pairs[6]),
            high(pairs[4], pairs[6]),
            low(pairs[5], pairs[7]),
            high(pairs[5], pairs[7]),
        ];
        [
            _mm256_permute2f128_ps::<0x20>(quads[0], quads[4]),
            _mm256_permute2f128_ps::<0x20>(quads[1], quads[5]),
            _mm256_permute2f128_ps::<0x20>(quads[2], quads[6]),
            _mm256_permute2f128_ps::<0x20>(quads[3], quads[7]),
            _mm256_permute2f128_ps::<0x31>(quads[0], quads[4]),
            _mm256_permute2f128_ps::<0x31>(quads[1], quads[5]),
            _mm256_permute2f128_ps::<0x31>(quads[2], quads[6]),
            _mm256_permute2f128_ps::<0x31>(quads[3], quads[7]),
        ]
    }
}

// ------------------------------------------------------------------------------------------------------ thin products

/// Few rows times a matrix whose rows are contiguous: it is read once, where it lies.
fn thin(out: Shared, stride: usize, accumulate: bool, alpha: f32, lhs: Matrix, rhs: Matrix) {
    /// Columns of a task: whole pages of the operand, each read by one thread.
    const WIDTH: usize = 16 * NR;
    /// Depth between two looks at the same results: the panel of columns in use stays in a level-one cache.
    const DEPTH: usize = 256;
    let (m, n, depth) = (lhs.rows, rhs.cols, lhs.cols);
    let panel = lhs_panel(depth);
    let mut a = buffers::take(panel_count(m, MR) * panel);
    pack_lhs(&mut a, panel, 0, lhs, 0..m, 0..depth);
    let a = &a[..];
    let width = WIDTH.min(n.div_ceil(2 * rayon::current_num_threads()).next_multiple_of(NR));
    (0..n.div_ceil(width)).into_par_iter().for_each(|task| {
        let left = task * width;
        for from in (0..depth.max(1)).step_by(DEPTH) {
            // SAFETY: tasks write disjoint columns; the operand has every column it is asked for.
            unsafe {
                let c = out.get().add(left);
                Block {
                    rows: m,
                    cols: width.min(n - left),
                    first: Stretch {
                        depth: DEPTH.min(depth - from),
                        a: a.as_ptr().add(from * MR),
                        a_panel: panel,
                        b: rhs.at(from, left),
                        b_panel: NR,
                        b_step: rhs.row_stride,
                    },
                    second: Stretch::NONE,
                    c,
                    c_stride: stride,
                    source: if accumulate || from > 0 { c } else { std::ptr::null() },
                    source_stride: stride,
                    bias: std::ptr::null(),
                    alpha,
                }
                .run();
            }
        }
    });
}

/// At most [`FEW_ROWS`] rows times the transpose of a matrix with contiguous rows, which streams by once.
fn few_rows(out: Shared, stride: usize, update: Update, alpha: f32, lhs: Matrix, rhs: Matrix) {
    let (m, n, depth) = (lhs.rows, rhs.cols, lhs.cols);
    // About 256 KiB of the matrix a task.
    let step = ((1 << 16) / depth.max(1)).clamp(2, n.max(2)).next_multiple_of(2);
    (0..n.div_ceil(step)).into_par_iter().for_each(|task| {
        for j in (task * step..n.min((task + 1) * step)).step_by(2) {
            let wide = (n - j).min(2);
            let line = |j: usize| &rhs.data[j * rhs.col_stride..][..depth];
            let lines = [line(j), line(j + wide - 1)];
            for i in (0..m).step_by(4) {
                let rows: [&[f32]; 4] =
                    std::array::from_fn(|r| &lhs.data[(i + r).min(m - 1) * lhs.row_stride..][..depth]);
                let dots = match m - i {
                    1 => dots::<1>(rows, lines),
                    2 => dots::<2>(rows, lines),
                    3 => dots::<3>(rows, lines),
                    _ => dots::<4>(rows, lines),
                };
                for (r, dots) in dots.iter().enumerate().take(m - i) {
                    for (c, dot) in dots.iter().enumerate().take(wide) {
                        // SAFETY: tasks write disjoint columns inside the results.
                        unsafe {
                            let result = out.get().add((i + r) * stride + j + c);
                            *result = alpha * dot + if update == Update::Accumulate { *result } else { 0.0 };
                        }
                    }
                }
            }
        }
    });
}

/// Products of `M` rows with two lines, all of one length.
fn dots<const M: usize>(rows: [&[f32]; 4], lines: [&[f32]; 2]) -> [[f32; 2]; 4] {
    let depth = lines[0].len();
    assert!(rows.iter().chain(&lines).all(|line| line.len() == depth));
    let mut dots = [[0f32; 2]; 4];
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
        done = depth / 16 * 16;
        // SAFETY: the features were found, the lengths are equal.
        dots = unsafe { avx2::dots::<M>(rows.map(<[f32]>::as_ptr), lines.map(<[f32]>::as_ptr), done) };
    }
    for (r, dots) in dots.iter_mut().enumerate().take(M) {
        for (dot, line) in dots.iter_mut().zip(lines) {
            *dot += sum_by(&rows[r][done..], &line[done..], |a, b| a * b);
        }
    }
    dots
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Numbers in (−1, 1) of a small generator.
    pub(crate) fn numbers(len: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    /// Runs `f` on pools of one, two and eight threads and returns its value, the same from all.
    pub(crate) fn on_pools<T: PartialEq + std::fmt::Debug + Send>(f: impl Fn() -> T + Sync) -> T {
        let run = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(&f);
        let first = run(1);
        for threads in [2, 8] {
            assert!(run(threads) == first, "{threads} threads give other bytes than one");
        }
        first
    }

    fn element(m: &Matrix, i: usize, j: usize) -> f64 {
        f64::from(m.data[i * m.row_stride + j * m.col_stride])
    }

    /// Every layout at shapes around the edges of tiles, stretches and tasks, against sums in f64.
    #[test]
    fn products_of_every_shape_and_layout() {
        let shapes = [
            (1, 1, 1),
            (1, 33, 70),
            (2, 5, 64),
            (3, 129, 17),
            (5, 40, 100),
            (8, 257, 33),
            (6, 16, 8),
            (7, 17, 9),
            (12, 32, 512),
            (13, 100, 513),
            (48, 31, 300),
            (49, 31, 30),
            (67, 130, 37),
            (133, 20, 1030),
            (70, 8, 65),
            (300, 64, 4),
            (20, 700, 8),
            (64, 48, 2100),
            (66, 15, 0),
            (3, 15, 0),
            (9, 15, 0),
        ];
        for (m, n, k) in shapes {
            let a = numbers(m.max(k) * (m.max(k) + 3) + 8, 1);
            let b = numbers(n.max(k) * (n.max(k) + 5) + 8, 2);
            let lefts = [Matrix::strided(&a, m, k, k + 3), Matrix::strided(&a, k, m, m + 3).t()];
            let rights = [Matrix::strided(&b, k, n, n + 5), Matrix::strided(&b, n, k, k + 5).t()];
            for left in lefts {
                for right in rights {
                    for update in [Update::Replace, Update::Accumulate] {
                        let before = match update {
                            Update::Replace => vec![f32::NAN; m * (n + 2)],
                            Update::Accumulate => numbers(m * (n + 2), 3),
                        };
                        let out = on_pools(|| {
                            let mut out = before.clone();
                            matmul(MatrixMut::strided(&mut out, m, n, n + 2), update, 0.5, left, right);
                            out.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
                        });
                        for i in 0..m {
                            for j in 0..n + 2 {
                                let got = f32::from_bits(out[i * (n + 2) + j]);
                                let was = before[i * (n + 2) + j];
                                if j >= n {
                                    assert_eq!(got.to_bits(), was.to_bits(), "between rows");
                                    continue;
                                }
                                let product: f64 =
                                    (0..k).map(|l| element(&left, i, l) * element(&right, l, j)).sum();
                                let size: f64 = (0..k)
                                    .map(|l| (element(&left, i, l) * element(&right, l, j)).abs())
                                    .sum();
                                let base = if update == Update::Accumulate { f64::from(was) } else { 0.0 };
                                let error = (f64::from(got) - base - 0.5 * product).abs();
                                assert!(
                                    error <= 1e-6 * (size + base.abs() + 1.0),
                                    "[{m},{k}]·[{k},{n}] at ({i}, {j}): {got} off by {error}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}
