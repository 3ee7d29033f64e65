//! Attention from new tokens to a cache of keys and values, for generation: each query goes once over the keys in its
//! sight and once over their values.
//!
//! ```text
//! k[slot] ← rotate(w ∘ x / √(mean x² + ε))      o = softmax(q·kᵀ/√d)·v over slots in sight
//! ```

use super::attention::{HeadNorms, soften, turn};
use super::buffers;
use super::matmul::Shared;
use super::simd::{sum_by, vectorised};
use rayon::prelude::*;

/// Products that are worth a task of their own.
const TASK: usize = 1 << 15;

/// The next tokens of rows that are continued together.
#[derive(Clone, Copy)]
pub(crate) struct CachedAttention<'a> {
    /// Rows.
    pub(crate) rows: usize,
    /// New tokens of each row.
    pub(crate) time: usize,
    /// Query heads.
    pub(crate) heads: usize,
    /// Key and value heads.
    pub(crate) kv_heads: usize,
    /// Numbers of a head.
    pub(crate) head_dim: usize,
    /// Slots of the cache.
    pub(crate) slots: usize,
    /// Those filled before.
    pub(crate) length: usize,
    /// Cosines and sines of the new tokens' angles, both `[rows · time, head_dim / 2]`.
    pub(crate) rotary: Option<(&'a [f32], &'a [f32])>,
    /// Norms of queries and keys.
    pub(crate) norms: Option<HeadNorms<'a>>,
    /// The slot of each row's first token.
    pub(crate) first: &'a [i32],
    /// How many tokens are seen at most, 0 for all.
    pub(crate) window: usize,
}

impl CachedAttention<'_> {
    /// Writes the new tokens' keys and values into their slots.
    ///
    /// # Shapes
    /// `keys` and `values` `[rows, kv_heads, slots, head_dim]`, `qkv` `[rows · time, (heads + 2 kv_heads) · head_dim]`.
    ///
    /// # Panics
    /// When a slice has another length than its shape says, or the slots do not suffice.
    pub(crate) fn keep(&self, keys: &mut [f32], values: &mut [f32], qkv: &[f32]) {
        self.check(keys.len(), values.len(), qkv.len());
        let d = self.head_dim;
        for (token, row) in qkv.chunks_exact(self.qkv_width()).enumerate() {
            let (of_keys, of_values) = row[self.heads * d..].split_at(self.kv_heads * d);
            let slot = self.length + token % self.time;
            for (head, (k, v)) in of_keys.chunks_exact(d).zip(of_values.chunks_exact(d)).enumerate() {
                let at = ((token / self.time * self.kv_heads + head) * self.slots + slot) * d;
                let norm = self.norms.map(|norms| (norms.k, norms.epsilon));
                turn(&mut keys[at..at + d], k, norm, self.angles(token), 1.0);
                values[at..at + d].copy_from_slice(v);
            }
        }
    }

    /// Attends from the new tokens, whose keys and values are in the cache.
    ///
    /// # Shapes
    /// As in [`Self::keep`]; `out` `[rows · time, heads · head_dim]`.
    ///
    /// # Panics
    /// As [`Self::keep`] does.
    pub(crate) fn attend(&self, out: &mut [f32], keys: &[f32], values: &[f32], qkv: &[f32]) {
        self.check(keys.len(), values.len(), qkv.len());
        let (d, heads) = (self.head_dim, self.heads);
        assert!(out.len() == self.rows * self.time * heads * d);
        let most = self.length + self.time;
        let tasks = self.rows * self.time * heads;
        let out = Shared(out.as_mut_ptr());
        let each = (TASK / (most * d)).max(1);
        (0..tasks).into_par_iter().with_min_len(each).for_each(|task| {
            let (token, head) = (task / heads, task % heads);
            // SAFETY: this head of this token is this task's.
            let out = unsafe { out.slice(task * d, d) };
            let mut q = buffers::take(d);
            let norm = self.norms.map(|norms| (norms.q, norms.epsilon));
            let x = &qkv[token * self.qkv_width() + head * d..][..d];
            turn(&mut q, x, norm, self.angles(token), (d as f32).powf(-0.5));

            let end = self.length + token % self.time + 1;
            let first = self.first[token / self.time] as usize;
            let start = if self.window == 0 { first } else { first.max(end.saturating_sub(self.window)) };
            let start = start.min(end - 1);
            let of_head = (token / self.time * self.kv_heads + head / (heads / self.kv_heads)) * self.slots;
            let seen = (of_head + start) * d..(of_head + end) * d;
            let mut weights = buffers::take(end - start);
            attend_head(out, &q, &keys[seen.clone()], &values[seen], &mut weights);
        });
    }

    fn check(&self, keys: usize, values: usize, qkv: usize) {
        assert!(self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads) && self.head_dim > 0);
        assert!(self.length + self.time <= self.slots && self.first.len() == self.rows && self.time > 0);
        let cache = self.rows * self.kv_heads * self.slots * self.head_dim;
        assert!(keys == cache && values == cache && qkv == self.rows * self.time * self.qkv_width());
        let half = self.rows * self.time * self.head_dim / 2;
        assert!(self.rotary.is_none_or(|(cos, sin)| cos.len() == half && sin.len() == half));
    }

    fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    fn angles(&self, token: usize) -> Option<(&[f32], &[f32])> {
        let half = self.head_dim / 2;
        self.rotary.map(|(cos, sin)| (&cos[token * half..][..half], &sin[token * half..][..half]))
    }
}

vectorised! {
    /// `softmax(q·kᵀ)·v` of one query.
    fn attend_head(out: &mut [f32], q: &[f32], keys: &[f32], values: &[f32], weights: &mut [f32]) {
        for (weight, key) in weights.iter_mut().zip(keys.chunks_exact(q.len())) {
            *weight = sum_by(q, key, |q, key| q * key);
        }
        let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0);
        let seen = 0..weights.len();
        soften(weights, seen, &mut max, &mut sum);
        out.fill(0.0);
        for (weight, value) in weights.iter().zip(values.chunks_exact(q.len())) {
            out.iter_mut().zip(value).for_each(|(out, value)| *out += weight * value);
        }
        out.iter_mut().for_each(|out| *out /= sum);
    }
}

#[cfg(test)]
mod tests {
    use super::super::attention::Attention;
    use super::super::matmul::tests::{numbers, on_pools};
    use super::*;

    /// A row that is continued token by token, or a few at a time, gets what it gets as a whole; rows are padded on the
    /// left and do not see their padding.
    #[test]
    fn tokens_in_pieces_attend_as_the_whole() {
        for (heads, kv_heads, head_dim, window, norms) in [(4, 2, 6, 0, true), (3, 1, 16, 5, false)] {
            let (rows, total, width) = (2, 11, (heads + 2 * kv_heads) * head_dim);
            let first = [0, 3];
            let qkv = numbers(rows * total * width, 1);
            let angles = numbers(rows * total * head_dim / 2, 2);
            let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
            let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
            let (wq, wk) = (numbers(head_dim, 3), numbers(head_dim, 4));
            let norms = norms.then_some(HeadNorms { q: &wq, k: &wk, epsilon: 1e-3 });

            // The whole, where padding sees itself alone.
            let starts: Vec<i32> = (0..rows * total)
                .map(|token| {
                    let start = (token / total * total) as i32 + first[token / total];
                    if (token as i32) < start { token as i32 } else { start }
                })
                .collect();
            let whole = Attention {
                tokens: rows * total,
                heads,
                kv_heads,
                head_dim,
                rotary: Some((&cos, &sin)),
                norms,
                first: &starts,
                window,
            };
            let size = rows * total * heads * head_dim;
            let (mut expected, mut lse) = (vec![0.0; size], vec![0.0; heads * rows * total]);
            whole.forward(&mut expected, &mut lse, &qkv);

            for pieces in [vec![11], vec![1; 11], vec![4, 1, 3, 3]] {
                let slots = 16;
                let got = on_pools(|| {
                    let mut keys = vec![f32::NAN; rows * kv_heads * slots * head_dim];
                    let mut values = keys.clone();
                    let mut got = vec![f32::NAN; size];
                    let mut length = 0;
                    for time in &pieces {
                        let take = |x: &[f32], width: usize| -> Vec<f32> {
                            let row = |row: usize| &x[(row * total + length) * width..][..time * width];
                            [row(0), row(1)].concat()
                        };
                        let (cos, sin) = (take(&cos, head_dim / 2), take(&sin, head_dim / 2));
                        let attention = CachedAttention {
                            rows,
                            time: *time,
                            heads,
                            kv_heads,
                            head_dim,
                            slots,
                            length,
                            rotary: Some((&cos, &sin)),
                            norms,
                            first: &first,
                            window,
                        };
                        let new = take(&qkv, width);
                        let mut out = vec![f32::NAN; rows * time * heads * head_dim];
                        attention.keep(&mut keys, &mut values, &new);
                        attention.attend(&mut out, &keys, &values, &new);
                        for (row, out) in out.chunks_exact(time * heads * head_dim).enumerate() {
                            let at = (row * total + length) * heads * head_dim;
                            got[at..at + out.len()].copy_from_slice(out);
                        }
                        length += time;
                    }
                    got
                });
                for (at, (got, expected)) in got.iter().zip(&expected).enumerate() {
                    // Of padding only that it is a number.
                    let token = at / (heads * head_dim);
                    let padding = ((token % total) as i32) < first[token / total];
                    assert!(
                        if padding { got.is_finite() } else { (got - expected).abs() < 1e-5 },
                        "{at}: {got} {expected}"
                    );
                }
            }
        }
    }
}
