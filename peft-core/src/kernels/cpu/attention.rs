//! Grouped causal attention over packed sequences, tile by tile with a running softmax, so that nothing of the size
//! tokens × tokens is ever stored (Dao, arXiv 2307.08691):
//!
//! ```text
//! q, k ← rotate(w ∘ x / √(mean x² + ε))      S = q·kᵀ/√d      P = exp(S − lse)      o = P·v
//! δ = Σ do ∘ o    dS = P ∘ (do·vᵀ − δ)      dv = Pᵀ·do    dk = dSᵀ·q/√d    dq = dS·k/√d
//! ```

use super::buffers::{self, Buffer};
use super::matmul::{
    Block, MR, Matrix, NR, Shared, Stretch, lhs_panel, pack_lhs, pack_rhs_panel, panel_count,
};
use super::rms_norm::inverse_rms;
use super::simd::{exp, sum_by, vectorised};
use rayon::prelude::*;
use std::ops::Range;

/// Queries of a tile.
const QUERIES: usize = 8 * MR;
/// Keys of a tile.
const KEYS: usize = 16 * NR;
/// Sequences that follow one another are done together up to so many tokens.
const SHORT: usize = 96;

/// RMS norms over each head before the rotation.
#[derive(Clone, Copy)]
pub(crate) struct HeadNorms<'a> {
    /// `[head_dim]` for the queries.
    pub(crate) q: &'a [f32],
    /// `[head_dim]` for the keys.
    pub(crate) k: &'a [f32],
    /// ε.
    pub(crate) epsilon: f32,
}

/// An attention without its data.
#[derive(Clone, Copy)]
pub(crate) struct Attention<'a> {
    /// Tokens of all sequences.
    pub(crate) tokens: usize,
    /// Query heads.
    pub(crate) heads: usize,
    /// Key and value heads; query head `h` attends to head `h / (heads / kv_heads)`.
    pub(crate) kv_heads: usize,
    /// Numbers of a head.
    pub(crate) head_dim: usize,
    /// Cosines and sines of the angles, both `[tokens, head_dim / 2]`, for the pairs `(i, i + head_dim / 2)`.
    pub(crate) rotary: Option<(&'a [f32], &'a [f32])>,
    /// Norms of queries and keys.
    pub(crate) norms: Option<HeadNorms<'a>>,
    /// The first token that each token sees, nondecreasing, `first[i] ≤ i`; a token of padding sees itself.
    pub(crate) first: &'a [i32],
    /// How many tokens are seen at most, 0 for all.
    pub(crate) window: usize,
}

/// Queries and keys as the scores see them, values beside them, all padded to whole panels of columns.
struct Prepared {
    /// `[heads][tokens][width]`, scaled by `1/√d`.
    q: Buffer,
    /// `[kv_heads][tokens][width]`.
    k: Buffer,
    /// `[kv_heads][tokens][width]`.
    v: Buffer,
    /// Packed transposes of the keys, `[kv_heads][panels][head_dim][NR]`.
    k_panels: Buffer,
    /// Those of the values, where asked for.
    v_panels: Buffer,
}

impl Attention<'_> {
    /// Attends.
    ///
    /// # Shapes
    /// `out` `[tokens, heads · head_dim]`, `lse` (logarithms of the sums of exponentials, for the backward pass)
    /// `[heads, tokens]`, `qkv` `[tokens, (heads + 2 kv_heads) · head_dim]`: all queries, all keys, all values.
    ///
    /// # Panics
    /// When a slice has another length than its shape says.
    pub(crate) fn forward(&self, out: &mut [f32], lse: &mut [f32], qkv: &[f32]) {
        self.check(out.len(), lse.len(), qkv.len());
        let prepared = self.prepare(qkv, false);
        let tiles: Vec<Range<usize>> =
            self.chunks().into_iter().flat_map(|chunk| tiles(chunk, QUERIES)).collect();
        let (out, lse) = (Shared(out.as_mut_ptr()), Shared(lse.as_mut_ptr()));
        // The tiles of most keys come last in a sequence: begin with them.
        (0..self.heads * tiles.len()).into_par_iter().for_each(|task| {
            let (head, tile) = (task % self.heads, &tiles[tiles.len() - 1 - task / self.heads]);
            self.forward_tile(out, lse, &prepared, head, tile.clone());
        });
    }

    /// The gradient of `qkv`.
    ///
    /// # Shapes
    /// As in [`Self::forward`]; `dqkv` like `qkv`, `dout` like `out`.
    ///
    /// # Panics
    /// When a slice has another length than its shape says.
    pub(crate) fn backward(&self, dqkv: &mut [f32], qkv: &[f32], out: &[f32], lse: &[f32], dout: &[f32]) {
        self.check(out.len(), lse.len(), qkv.len());
        assert!(dqkv.len() == qkv.len() && dout.len() == out.len());
        let prepared = self.prepare(qkv, true);
        let size = self.heads * self.tokens * self.width();
        let [mut dq, mut dk, mut dv] = [(); 3].map(|()| buffers::take(size));
        let [q_out, k_out, v_out] = [&mut dq, &mut dk, &mut dv].map(|buffer| Shared(buffer.as_mut_ptr()));
        let mut chunks = self.chunks();
        chunks.sort_by_key(|chunk| std::cmp::Reverse(chunk.len()));
        (0..self.heads * chunks.len()).into_par_iter().for_each(|task| {
            let (head, chunk) = (task % self.heads, chunks[task / self.heads].clone());
            self.backward_chunk([q_out, k_out, v_out], &prepared, head, chunk, out, lse, dout);
        });
        self.finish(dqkv, qkv, &dq, &dk, &dv);
    }

    fn check(&self, out: usize, lse: usize, qkv: usize) {
        let d = self.head_dim;
        assert!(
            self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads),
            "heads that do not fall in groups"
        );
        assert!(out == self.tokens * self.heads * d && lse == self.heads * self.tokens);
        assert!(qkv == self.tokens * self.qkv_width() && self.first.len() == self.tokens);
        assert!(self.first.iter().enumerate().all(|(i, first)| (0..=i as i64).contains(&i64::from(*first))));
        assert!(self.first.is_sorted(), "first tokens that go back");
        if let Some((cos, sin)) = self.rotary {
            assert!(d.is_multiple_of(2) && cos.len() == self.tokens * d / 2 && sin.len() == cos.len());
        }
        assert!(self.norms.is_none_or(|norms| norms.q.len() == d && norms.k.len() == d));
    }

    fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Columns of a head in whole panels.
    fn width(&self) -> usize {
        self.head_dim.next_multiple_of(NR)
    }

    /// The first key that token `i` sees.
    fn start(&self, i: usize) -> usize {
        let first = self.first[i] as usize;
        if self.window == 0 { first } else { first.max((i + 1).saturating_sub(self.window)) }
    }

    /// Ranges of tokens that do not see one another: sequences, short ones together.
    fn chunks(&self) -> Vec<Range<usize>> {
        let mut chunks: Vec<Range<usize>> = Vec::new();
        let mut starts = (0..self.tokens).filter(|i| self.first[*i] as usize == *i).peekable();
        while let Some(start) = starts.next() {
            let end = starts.peek().copied().unwrap_or(self.tokens);
            match chunks.last_mut() {
                Some(chunk) if end - chunk.start <= SHORT => chunk.end = end,
                _ => chunks.push(start..end),
            }
        }
        chunks
    }

    /// Normalises, rotates, scales and lays out queries, keys and values.
    fn prepare(&self, qkv: &[f32], with_v_panels: bool) -> Prepared {
        let (tokens, d, width) = (self.tokens, self.head_dim, self.width());
        let mut q = buffers::take(self.heads * tokens * width);
        let mut k = buffers::take(self.kv_heads * tokens * width);
        let mut v = buffers::take(self.kv_heads * tokens * width);
        let scale = (d as f32).powf(-0.5);
        let (q_out, k_out, v_out) = (Shared(q.as_mut_ptr()), Shared(k.as_mut_ptr()), Shared(v.as_mut_ptr()));
        self.by_tokens(|i| {
            let row = &qkv[i * self.qkv_width()..][..self.qkv_width()];
            for (head, x) in row.chunks_exact(d.max(1)).enumerate() {
                let (out, head, weight, scale) = if head < self.heads {
                    (q_out, head, self.norms.map(|norms| norms.q), scale)
                } else if head < self.heads + self.kv_heads {
                    (k_out, head - self.heads, self.norms.map(|norms| norms.k), 1.0)
                } else {
                    // SAFETY: each token's row is one task's.
                    let into = unsafe {
                        v_out.slice(((head - self.heads - self.kv_heads) * tokens + i) * width, width)
                    };
                    into[..d].copy_from_slice(x);
                    into[d..].fill(0.0);
                    continue;
                };
                // SAFETY: each token's row is one task's.
                let into = unsafe { out.slice((head * tokens + i) * width, width) };
                let norm = weight.map(|weight| (weight, self.norms.map_or(0.0, |norms| norms.epsilon)));
                turn(&mut into[..d], x, norm, self.angles(i), scale);
                into[d..].fill(0.0);
            }
        });
        let pack = |x: &[f32]| {
            let panels = panel_count(tokens, NR);
            let mut packed = buffers::take(self.kv_heads * panels * d * NR);
            packed.par_chunks_mut((d * NR).max(1)).enumerate().for_each(|(i, packed)| {
                let (head, panel) = (i / panels, i % panels);
                let x = Matrix::strided(&x[head * tokens * width..], tokens, d, width).t();
                pack_rhs_panel(packed, x, 0..d, panel * NR..tokens);
            });
            packed
        };
        let k_panels = pack(&k);
        let v_panels = if with_v_panels { pack(&v) } else { buffers::take(0) };
        Prepared { q, k, v, k_panels, v_panels }
    }

    fn angles(&self, i: usize) -> Option<(&[f32], &[f32])> {
        let half = self.head_dim / 2;
        self.rotary.map(|(cos, sin)| (&cos[i * half..][..half], &sin[i * half..][..half]))
    }

    /// Runs `f` once for every token.
    fn by_tokens(&self, f: impl Fn(usize) + Sync + Send) {
        (0..self.tokens).into_par_iter().with_min_len(16).for_each(f);
    }

    /// The scores of `queries` against `keys`, `[queries][KEYS]`; `keys` begins on a panel.
    fn scores(
        &self,
        into: &mut [f32],
        a: &[f32],
        panels: &[f32],
        head: usize,
        queries: usize,
        keys: Range<usize>,
    ) {
        let (d, kv) = (self.head_dim, head / (self.heads / self.kv_heads));
        let b = &panels[(kv * panel_count(self.tokens, NR) + keys.start / NR) * d * NR..];
        // SAFETY: operands hold these panels, and rows of `into` are `KEYS` apart.
        unsafe {
            Block {
                rows: queries,
                cols: keys.len(),
                first: Stretch::packed(d, a, lhs_panel(d), b),
                c: into.as_mut_ptr(),
                c_stride: KEYS,
                ..Block::EMPTY
            }
            .run()
        }
    }

    /// The outputs of one head for a tile of queries.
    fn forward_tile(&self, out: Shared, lse: Shared, prepared: &Prepared, head: usize, tile: Range<usize>) {
        let (tokens, d, width, rows) = (self.tokens, self.head_dim, self.width(), tile.len());
        let kv = head / (self.heads / self.kv_heads);
        let q = Matrix::strided(&prepared.q[head * tokens * width..], tokens, d, width);
        let v = &prepared.v[kv * tokens * width..][..tokens * width];
        let mut a = buffers::take(QUERIES / MR * lhs_panel(d));
        pack_lhs(&mut a, lhs_panel(d), 0, q, tile.clone(), 0..d);
        let mut scores = buffers::take(QUERIES * KEYS);
        let mut p = buffers::take(QUERIES / MR * lhs_panel(KEYS));
        let mut o = buffers::take(QUERIES * width);
        o.fill(0.0);
        let mut max = [f32::NEG_INFINITY; QUERIES];
        let mut sum = [0f32; QUERIES];
        for keys in tiles(self.start(tile.start) / NR * NR..tile.end, KEYS) {
            self.scores(&mut scores, &a, &prepared.k_panels, head, rows, keys.clone());
            for (r, i) in tile.clone().enumerate() {
                let row = &mut scores[r * KEYS..][..keys.len()];
                let seen = seen(self.start(i)..i + 1, &keys);
                let rescale = soften(row, seen, &mut max[r], &mut sum[r]);
                if rescale != 1.0 {
                    o[r * width..][..width].iter_mut().for_each(|o| *o *= rescale);
                }
            }
            let panel = lhs_panel(keys.len());
            pack_lhs(
                &mut p,
                panel,
                0,
                Matrix::strided(&scores, rows, keys.len(), KEYS),
                0..rows,
                0..keys.len(),
            );
            let b = &v[keys.start * width..];
            // SAFETY: the values have `width` columns at these keys, the results these queries.
            unsafe { accumulate(o.as_mut_ptr(), rows, width, in_place(keys.len(), &p, panel, b, width)) };
        }
        for (r, i) in tile.enumerate() {
            let inverse = 1.0 / sum[r];
            // SAFETY: this head of this token is this task's.
            let (out, lse) =
                unsafe { (out.slice((i * self.heads + head) * d, d), lse.slice(head * tokens + i, 1)) };
            out.iter_mut().zip(&o[r * width..]).for_each(|(out, o)| *out = o * inverse);
            lse[0] = max[r] + sum[r].ln();
        }
    }

    /// The gradients of one head's queries, keys and values in a chunk, as the scores see them.
    #[allow(clippy::too_many_arguments)]
    fn backward_chunk(
        &self,
        [dq, dk, dv]: [Shared; 3],
        prepared: &Prepared,
        head: usize,
        chunk: Range<usize>,
        out: &[f32],
        lse: &[f32],
        dout: &[f32],
    ) {
        let (tokens, d, width) = (self.tokens, self.head_dim, self.width());
        let kv = head / (self.heads / self.kv_heads);
        let of_head =
            |x: &Buffer, head: usize| head * tokens * width..x.len().min((head + 1) * tokens * width);
        let q = &prepared.q[of_head(&prepared.q, head)];
        let k = &prepared.k[of_head(&prepared.k, kv)];
        // SAFETY: these tokens of this head are this task's.
        let [dq, dk, dv] = [dq, dk, dv]
            .map(|x| unsafe { x.slice((head * tokens + chunk.start) * width, chunk.len() * width) });
        for gradient in [&mut *dq, &mut *dk, &mut *dv] {
            gradient.fill(0.0);
        }
        let local = |i: usize| (i - chunk.start) * width;
        let mut a = buffers::take(QUERIES / MR * lhs_panel(d));
        let mut p = buffers::take(QUERIES * KEYS);
        let mut ds = buffers::take(QUERIES * KEYS);
        let mut packed =
            buffers::take((KEYS.div_ceil(MR) * lhs_panel(QUERIES)).max(QUERIES / MR * lhs_panel(KEYS)));
        let mut d_out = buffers::take(QUERIES * width);
        d_out.fill(0.0);
        for tile in tiles(chunk.clone(), QUERIES) {
            let rows = tile.len();
            let mut delta = [0f32; QUERIES];
            for (r, i) in tile.clone().enumerate() {
                let at = (i * self.heads + head) * d..(i * self.heads + head + 1) * d;
                d_out[r * width..][..d].copy_from_slice(&dout[at.clone()]);
                delta[r] = dot(&dout[at.clone()], &out[at]);
            }
            // Keys before the chunk are in sight of no one; its first panel may begin before it.
            for keys in tiles(self.start(tile.start) / NR * NR..tile.end, KEYS) {
                let q_tile = Matrix::strided(q, tokens, d, width);
                pack_lhs(&mut a, lhs_panel(d), 0, q_tile, tile.clone(), 0..d);
                self.scores(&mut p, &a, &prepared.k_panels, head, rows, keys.clone());
                pack_lhs(&mut a, lhs_panel(d), 0, Matrix::strided(&d_out, rows, d, width), 0..rows, 0..d);
                self.scores(&mut ds, &a, &prepared.v_panels, head, rows, keys.clone());
                for (r, i) in tile.clone().enumerate() {
                    let seen = seen(self.start(i)..i + 1, &keys);
                    let at = r * KEYS..r * KEYS + keys.len();
                    let lse = lse[head * tokens + i];
                    probabilities(&mut p[at.clone()], &mut ds[at], seen, lse, delta[r]);
                }
                // Of the keys, those of the chunk.
                let skip = chunk.start.saturating_sub(keys.start);
                let own = keys.start + skip..keys.end;
                let panel = lhs_panel(rows);
                for (x, into, b) in [(&p, &mut *dv, &d_out[..]), (&ds, &mut *dk, &q[tile.start * width..])] {
                    let x = Matrix::strided(&x[skip..], rows, own.len(), KEYS).t();
                    pack_lhs(&mut packed, panel, 0, x, 0..own.len(), 0..rows);
                    let c = into[local(own.start)..].as_mut_ptr();
                    // SAFETY: `b` has `width` columns at these queries, the results these keys.
                    unsafe { accumulate(c, own.len(), width, in_place(rows, &packed, panel, b, width)) };
                }
                let panel = lhs_panel(keys.len());
                let x = Matrix::strided(&ds, rows, keys.len(), KEYS);
                pack_lhs(&mut packed, panel, 0, x, 0..rows, 0..keys.len());
                let c = dq[local(tile.start)..].as_mut_ptr();
                // SAFETY: the keys have `width` columns, the results these queries.
                unsafe {
                    let b = &k[keys.start * width..];
                    accumulate(c, rows, width, in_place(keys.len(), &packed, panel, b, width));
                }
            }
        }
    }

    /// Sums over groups, then back through scale, rotation and norm.
    fn finish(&self, dqkv: &mut [f32], qkv: &[f32], dq: &[f32], dk: &[f32], dv: &[f32]) {
        let (tokens, d, width) = (self.tokens, self.head_dim, self.width());
        let group = self.heads / self.kv_heads;
        let scale = (d as f32).powf(-0.5);
        let row_width = self.qkv_width();
        let dqkv = Shared(dqkv.as_mut_ptr());
        self.by_tokens(|i| {
            let mut gradient = vec![0f32; d];
            let x = &qkv[i * row_width..][..row_width];
            // SAFETY: each token's row is one task's.
            let dx = unsafe { dqkv.slice(i * row_width, row_width) };
            let head_of = |x, head: usize| -> &[f32] {
                let x: &[f32] = x;
                &x[(head * tokens + i) * width..][..d]
            };
            for (head, (x, dx)) in x.chunks_exact(d.max(1)).zip(dx.chunks_exact_mut(d.max(1))).enumerate() {
                let weight = if head < self.heads {
                    gradient.copy_from_slice(head_of(dq, head));
                    gradient.iter_mut().for_each(|g| *g *= scale);
                    self.norms.map(|norms| norms.q)
                } else {
                    let (from, kv) = match head < self.heads + self.kv_heads {
                        true => (dk, head - self.heads),
                        false => (dv, head - self.heads - self.kv_heads),
                    };
                    gradient.copy_from_slice(head_of(from, kv * group));
                    for head in kv * group + 1..(kv + 1) * group {
                        gradient.iter_mut().zip(head_of(from, head)).for_each(|(g, of_head)| *g += of_head);
                    }
                    if head >= self.heads + self.kv_heads {
                        dx.copy_from_slice(&gradient);
                        continue;
                    }
                    self.norms.map(|norms| norms.k)
                };
                let norm = weight.map(|weight| (weight, self.norms.map_or(0.0, |norms| norms.epsilon)));
                turn_back(dx, &mut gradient, x, norm, self.angles(i));
            }
        });
    }
}

/// `range` in pieces of `step`.
fn tiles(range: Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(step).map(move |from| from..range.end.min(from + step))
}

/// The part of `keys` that is in `sight`, counted from its start.
fn seen(sight: Range<usize>, keys: &Range<usize>) -> Range<usize> {
    let start = sight.start.clamp(keys.start, keys.end) - keys.start;
    start..(sight.end.clamp(keys.start, keys.end) - keys.start).max(start)
}

/// A stretch whose right operand lies in rows of `width` numbers, a multiple of `NR`.
fn in_place(depth: usize, a: &[f32], a_panel: usize, b: &[f32], width: usize) -> Stretch {
    Stretch { depth, a: a.as_ptr(), a_panel, b: b.as_ptr(), b_panel: NR, b_step: width }
}

/// `c += a·b`, `c` without gaps.
///
/// # Safety
/// `c` has `rows · cols` numbers, the operands what their sizes say.
unsafe fn accumulate(c: *mut f32, rows: usize, cols: usize, first: Stretch) {
    let block =
        Block { rows, cols, first, c, c_stride: cols, source: c, source_stride: cols, ..Block::EMPTY };
    // SAFETY: the caller's promise.
    unsafe { block.run() }
}

vectorised! {
    /// Scalar product.
    fn dot(a: &[f32], b: &[f32]) -> f32 {
        sum_by(a, b, |a, b| a * b)
    }

    /// Turns the scores in sight into `exp(score − max)` under the new running maximum, the others into 0, and adds to the
    /// running sum; returns what earlier terms are to be multiplied by.
    pub(super) fn soften(row: &mut [f32], seen: Range<usize>, max: &mut f32, sum: &mut f32) -> f32 {
        row[..seen.start].fill(0.0);
        row[seen.end..].fill(0.0);
        let row = &mut row[seen];
        if row.is_empty() {
            return 1.0;
        }
        let new_max = super::simd::max(row).max(*max);
        let rescale = if *max == new_max { 1.0 } else { exp(*max - new_max) };
        row.iter_mut().for_each(|v| *v = exp(*v - new_max));
        *sum = *sum * rescale + sum_by(row, row, |v, _| v);
        *max = new_max;
        rescale
    }

    /// Turns scores into probabilities, and the products of `do` with the values into the scores' gradients.
    fn probabilities(p: &mut [f32], ds: &mut [f32], seen: Range<usize>, lse: f32, delta: f32) {
        for x in [&mut *p, &mut *ds] {
            x[..seen.start].fill(0.0);
            x[seen.end..].fill(0.0);
        }
        for (p, ds) in p[seen.clone()].iter_mut().zip(&mut ds[seen]) {
            *p = exp(*p - lse);
            *ds = *p * (*ds - delta);
        }
    }

    /// Normalises where asked, rotates where asked, and scales one head.
    pub(super) fn turn(out: &mut [f32], x: &[f32], norm: Option<(&[f32], f32)>, angles: Option<(&[f32], &[f32])>, scale: f32) {
        match norm {
            Some((weight, epsilon)) => {
                let inverse = inverse_rms(x, epsilon);
                for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
                    *out = w * (x * inverse);
                }
            }
            None => out.copy_from_slice(x),
        }
        if let Some((cos, sin)) = angles {
            let (low, high) = out.split_at_mut(cos.len());
            for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
            }
        }
        out.iter_mut().for_each(|out| *out *= scale);
    }

    /// The gradient through [`turn`] without its scale; `gradient` is used up.
    fn turn_back(
        dx: &mut [f32],
        gradient: &mut [f32],
        x: &[f32],
        norm: Option<(&[f32], f32)>,
        angles: Option<(&[f32], &[f32])>,
    ) {
        if let Some((cos, sin)) = angles {
            let (low, high) = gradient.split_at_mut(cos.len());
            for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                (*low, *high) = (*low * cos + *high * sin, *high * cos - *low * sin);
            }
        }
        match norm {
            Some((weight, epsilon)) => {
                gradient.iter_mut().zip(weight).for_each(|(g, w)| *g *= w);
                let inverse = inverse_rms(x, epsilon);
                let mean = sum_by(gradient, x, |g, x| g * x) / x.len() as f32 * inverse * inverse;
                for ((dx, g), x) in dx.iter_mut().zip(&*gradient).zip(x) {
                    *dx = inverse * (g - x * mean);
                }
            }
            None => dx.copy_from_slice(gradient),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::matmul::tests::{numbers, on_pools};
    use super::*;

    /// The outputs and `lse` in f64, token by token from the definition.
    fn reference(at: &Attention, qkv: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let (n, h, kv, d) = (at.tokens, at.heads, at.kv_heads, at.head_dim);
        let turned = |i: usize, head: usize, weight: Option<&[f32]>| -> Vec<f64> {
            let mut x = qkv[(i * (h + 2 * kv) + head) * d..][..d].to_vec();
            if let Some(weight) = weight {
                let mean = x.iter().map(|v| v * v).sum::<f64>() / d as f64;
                let root = (mean + f64::from(at.norms.unwrap().epsilon)).sqrt();
                x.iter_mut().zip(weight).for_each(|(x, w)| *x = *x / root * f64::from(*w));
            }
            if let Some((cos, sin)) = at.rotary {
                for p in 0..d / 2 {
                    let (c, s) = (f64::from(cos[i * d / 2 + p]), f64::from(sin[i * d / 2 + p]));
                    (x[p], x[p + d / 2]) = (x[p] * c - x[p + d / 2] * s, x[p + d / 2] * c + x[p] * s);
                }
            }
            x
        };
        let (mut out, mut lse) = (vec![0.0; n * h * d], vec![0.0; h * n]);
        for head in 0..h {
            let kv_head = head / (h / kv);
            for i in 0..n {
                let q = turned(i, head, at.norms.map(|norms| norms.q));
                let sees = |j: &usize| at.first[i] as usize <= *j && (at.window == 0 || i - j < at.window);
                let keys: Vec<usize> = (0..=i).filter(sees).collect();
                let weights: Vec<f64> = keys
                    .iter()
                    .map(|j| {
                        let k = turned(*j, h + kv_head, at.norms.map(|norms| norms.k));
                        (q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / (d as f64).sqrt()).exp()
                    })
                    .collect();
                let sum: f64 = weights.iter().sum();
                lse[head * n + i] = sum.ln();
                for (j, weight) in keys.iter().zip(&weights) {
                    for c in 0..d {
                        out[(i * h + head) * d + c] +=
                            weight / sum * qkv[(j * (h + 2 * kv) + h + kv + kv_head) * d + c];
                    }
                }
            }
        }
        (out, lse)
    }

    /// Sequences of these lengths, then padding.
    fn firsts(lengths: &[usize], padding: usize) -> Vec<i32> {
        let mut first = Vec::new();
        for length in lengths {
            first.extend(std::iter::repeat_n(first.len() as i32, *length));
        }
        (0..padding).for_each(|_| first.push(first.len() as i32));
        first
    }

    struct Case {
        lengths: &'static [usize],
        padding: usize,
        heads: [usize; 3],
        rotary: bool,
        norms: bool,
        window: usize,
        /// How many entries of the gradient are held against differences.
        probes: usize,
    }

    #[test]
    fn forward_and_gradient_against_the_definition() {
        let cases = [
            Case {
                lengths: &[1],
                padding: 0,
                heads: [1, 1, 1],
                rotary: false,
                norms: false,
                window: 0,
                probes: 3,
            },
            Case {
                lengths: &[5, 3],
                padding: 2,
                heads: [4, 2, 6],
                rotary: true,
                norms: true,
                window: 0,
                probes: 60,
            },
            Case {
                lengths: &[20, 1, 31],
                padding: 3,
                heads: [3, 1, 8],
                rotary: true,
                norms: false,
                window: 7,
                probes: 40,
            },
            Case {
                lengths: &[60],
                padding: 0,
                heads: [2, 2, 16],
                rotary: true,
                norms: true,
                window: 0,
                probes: 30,
            },
            Case {
                lengths: &[7, 90, 55],
                padding: 9,
                heads: [4, 2, 20],
                rotary: true,
                norms: true,
                window: 33,
                probes: 20,
            },
            Case {
                lengths: &[300],
                padding: 1,
                heads: [2, 1, 5],
                rotary: false,
                norms: true,
                window: 0,
                probes: 12,
            },
            Case {
                lengths: &[11, 320],
                padding: 0,
                heads: [2, 2, 4],
                rotary: true,
                norms: false,
                window: 280,
                probes: 12,
            },
            Case {
                lengths: &[130, 141],
                padding: 5,
                heads: [2, 1, 64],
                rotary: true,
                norms: false,
                window: 0,
                probes: 6,
            },
        ];
        for case in cases {
            let [heads, kv_heads, head_dim] = case.heads;
            let first = firsts(case.lengths, case.padding);
            let tokens = first.len();
            let angles = numbers(tokens * head_dim / 2, 1);
            let cos: Vec<f32> = angles.iter().map(|a| (3.0 * a).cos()).collect();
            let sin: Vec<f32> = angles.iter().map(|a| (3.0 * a).sin()).collect();
            let (wq, wk) = (numbers(head_dim, 2), numbers(head_dim, 3));
            let at = Attention {
                tokens,
                heads,
                kv_heads,
                head_dim,
                rotary: case.rotary.then_some((&cos, &sin)),
                norms: case.norms.then_some(HeadNorms { q: &wq, k: &wk, epsilon: 1e-3 }),
                first: &first,
                window: case.window,
            };
            let qkv: Vec<f32> = numbers(tokens * at.qkv_width(), 4)
                .iter()
                .map(|v| if case.norms { *v } else { 2.0 * v })
                .collect();
            let dout = numbers(tokens * heads * head_dim, 5);
            let (out, lse, dqkv) = on_pools(|| {
                let mut out = vec![f32::NAN; dout.len()];
                let mut lse = vec![f32::NAN; heads * tokens];
                let mut dqkv = vec![f32::NAN; qkv.len()];
                at.forward(&mut out, &mut lse, &qkv);
                at.backward(&mut dqkv, &qkv, &out, &lse, &dout);
                (out, lse, dqkv)
            });
            let mut exact: Vec<f64> = qkv.iter().map(|v| f64::from(*v)).collect();
            let (expected, expected_lse) = reference(&at, &exact);
            for (got, expected) in out.iter().chain(&lse).zip(expected.iter().chain(&expected_lse)) {
                assert!((f64::from(*got) - expected).abs() < 2e-5, "{tokens} tokens: {got} {expected}");
            }
            let loss = |qkv: &[f64]| -> f64 {
                reference(&at, qkv).0.iter().zip(&dout).map(|(o, g)| o * f64::from(*g)).sum()
            };
            for probe in 0..case.probes {
                let e = (probe * 7919 + probe * probe) % qkv.len();
                let (x, step) = (exact[e], 1e-5);
                exact[e] = x + step;
                let above = loss(&exact);
                exact[e] = x - step;
                let below = loss(&exact);
                exact[e] = x;
                let expected = (above - below) / (2.0 * step);
                let got = f64::from(dqkv[e]);
                assert!(
                    (got - expected).abs() < 1e-4 * (1.0 + expected.abs()),
                    "{tokens} tokens, {e}: {got} {expected}"
                );
            }
            assert!(dqkv.iter().all(|v| v.is_finite()));
        }
    }

    /// Scores far apart neither overflow nor lose the largest.
    #[test]
    fn large_scores() {
        let first = [0, 0, 0];
        let at = Attention {
            tokens: 3,
            heads: 1,
            kv_heads: 1,
            head_dim: 1,
            rotary: None,
            norms: None,
            first: &first,
            window: 0,
        };
        let qkv = [100.0, 1.0, 1.0, 100.0, 50.0, 2.0, 100.0, -100.0, 3.0];
        let (mut out, mut lse) = ([0.0; 3], [0.0; 3]);
        at.forward(&mut out, &mut lse, &qkv);
        assert_eq!((out, lse), ([1.0, 2.0, 2.0], [100.0, 5000.0, 5000.0]));
    }
}
