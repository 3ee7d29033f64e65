//! Keys and values of the tokens seen so far, for generation in batches.

use super::context::Sequences;
use crate::kernels::attention;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

/// Added to the scores of keys that are padding: so low that their weights are 0 beside any real key, and finite, so
/// that a query of padding, which sees nothing else, stays a number.
const HIDDEN: f32 = -1e30;

/// What a decoder remembers of rows that are continued together.
///
/// All rows are of the same length: shorter ones are padded on the left, so that every row's next token stands in the
/// same slot. A row's positions count from its first real token, so it is continued as it would be alone.
pub struct Cache {
    /// One a layer.
    pub(super) layers: Vec<KeyValueCache>,
    /// The slot of each row's first token.
    first: Vec<usize>,
    /// Slots filled.
    length: usize,
    /// 0 for slots of tokens, filled or not, [`HIDDEN`] for those of padding, `[rows, 1, 1, 1, slots]`; absent where
    /// there is no padding. Grows by doubling, as the buffers do.
    padding: Option<Tensor<5>>,
}

impl Cache {
    /// Empty, for as many rows as `padding` has entries, each of which is how many tokens of padding a row begins with.
    pub(super) fn new(layers: usize, padding: Vec<usize>) -> Self {
        Self {
            layers: (0..layers).map(|_| KeyValueCache::default()).collect(),
            first: padding,
            length: 0,
            padding: None,
        }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.first.len()
    }

    /// Slots filled in each row, padding included.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The slot of each row's first token.
    pub fn first(&self) -> &[usize] {
        &self.first
    }

    /// Makes room for `time` more slots and returns the masks of padding for all slots up to these.
    pub(super) fn advance(&mut self, time: usize, device: &Device) -> Option<Tensor<5>> {
        self.length += time;
        let needed = self.length;
        let longest = *self.first.iter().max()?;
        if longest == 0 {
            return None;
        }
        if self.padding.as_ref().is_none_or(|mask| mask.dims()[4] < needed) {
            let slots = capacity(needed);
            let mut mask = vec![0f32; self.rows() * slots];
            for (row, first) in mask.chunks_exact_mut(slots).zip(&self.first) {
                row[..*first].fill(HIDDEN);
            }
            let data = TensorData::new(mask, [self.rows(), 1, 1, 1, slots]);
            self.padding = Some(Tensor::from_data(data, (device, DType::F32)));
        }
        self.padding.as_ref().map(|mask| mask.clone().narrow(4, 0, needed))
    }

    /// Keeps the given rows and forgets the others.
    pub fn keep(&mut self, rows: &[usize]) {
        for layer in &mut self.layers {
            layer.keep(rows);
        }
        self.first = rows.iter().map(|row| self.first[*row]).collect();
        self.padding = None;
    }
}

/// One layer's keys and values in a buffer that doubles when full, so that appending a token copies one token.
#[derive(Default)]
pub struct KeyValueCache {
    /// `[rows, kv_heads, slots, head_dim]`.
    buffers: Option<(Tensor<4>, Tensor<4>)>,
    length: usize,
}

impl KeyValueCache {
    /// Appends the keys and values of new tokens, `[rows, kv_heads, time, head_dim]`, and attends from the tokens'
    /// queries `[rows, heads, time, head_dim]` to all that is held, as far as `sequences` and `window` let them see.
    pub(super) fn attend(
        &mut self,
        q: Tensor<4>,
        [k, v]: [Tensor<4>; 2],
        sequences: &Sequences,
        window: Option<usize>,
    ) -> Tensor<4> {
        let mask = sequences.mask(window);
        if self.length == 0 {
            self.append(k.clone(), v.clone());
            return attention(q, k, v, mask);
        }
        let time = k.dims()[2];
        self.append(k, v);
        // A single query sees the last slots, whose number the mask has too.
        let seen = match window {
            Some(window) if time == 1 => window.min(self.length),
            _ => self.length,
        };
        let first = self.length - seen;
        // Views, gone before the next assignment, which finds the buffers unshared and writes in place.
        let views = self
            .buffers
            .as_ref()
            .map(|(keys, values)| [keys, values].map(|buffer| buffer.clone().narrow(2, first, seen)));
        match views {
            Some([k, v]) => attention(q, k, v, mask),
            None => q,
        }
    }

    fn append(&mut self, k: Tensor<4>, v: Tensor<4>) {
        let (keys, values) = self.buffers.take().unzip();
        let keys = written(keys, self.length, &k);
        let values = written(values, self.length, &v);
        self.length += k.dims()[2];
        self.buffers = Some((keys, values));
    }

    fn keep(&mut self, rows: &[usize]) {
        let rows: Vec<i64> = rows.iter().map(|row| *row as i64).collect();
        self.buffers = self.buffers.take().map(|(keys, values)| {
            let index = TensorData::new(rows.clone(), [rows.len()]);
            let index: Tensor<1, Int> = Tensor::from_data(index, &keys.device());
            (keys.select(0, index.clone()), values.select(0, index))
        });
    }
}

/// `buffer`, of which `length` slots are filled, with `new` in the slots after these; a larger one if they do not fit.
fn written(buffer: Option<Tensor<4>>, length: usize, new: &Tensor<4>) -> Tensor<4> {
    let [rows, heads, time, head_dim] = new.dims();
    let needed = length + time;
    let buffer = match buffer {
        Some(buffer) if buffer.dims()[2] >= needed => buffer,
        full => {
            let shape = [rows, heads, capacity(needed), head_dim];
            let fresh = Tensor::zeros(shape, (&new.device(), new.dtype()));
            match full {
                Some(old) => {
                    fresh.slice_assign([0..rows, 0..heads, 0..length, 0..head_dim], old.narrow(2, 0, length))
                }
                None => fresh,
            }
        }
    };
    buffer.slice_assign([0..rows, 0..heads, length..needed, 0..head_dim], new.clone())
}

/// Slots of a buffer that must hold `needed`.
fn capacity(needed: usize) -> usize {
    needed.next_power_of_two().max(64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(values: &[f32], heads: usize) -> Tensor<4> {
        let shape = [1, heads, values.len() / heads, 1];
        Tensor::from_data(TensorData::new(values.to_vec(), shape), &Device::flex())
    }

    #[test]
    fn tokens_are_appended_across_a_growth_of_the_buffer() {
        let mut cache = KeyValueCache::default();
        let values: Vec<f32> = (0..70).map(|i| i as f32).collect();
        let head = |values: &[f32]| tensor(&[values, values].concat(), 2);
        cache.append(head(&values[..60]), head(&values[..60]));
        for value in &values[60..] {
            cache.append(head(&[*value]), head(&[-value]));
        }
        let (keys, held) =
            cache.buffers.take().map(|(k, v)| (k.narrow(2, 0, 70), v.narrow(2, 60, 10))).unwrap();
        assert_eq!(keys.try_into_vec_as::<f32>().unwrap(), [&values[..], &values[..]].concat());
        let negative: Vec<f32> = values[60..].iter().map(|value| -value).collect();
        assert_eq!(held.try_into_vec_as::<f32>().unwrap(), [&negative[..], &negative[..]].concat());
    }

    #[test]
    fn padding_is_hidden_in_its_own_row_and_follows_the_rows_that_are_kept() {
        let device = Device::flex();
        let hidden = |mask: Option<Tensor<5>>| -> Vec<bool> {
            mask.unwrap().try_into_vec_as::<f32>().unwrap().iter().map(|v| *v != 0.0).collect()
        };
        let mut cache = Cache::new(0, vec![0, 2]);
        assert_eq!(hidden(cache.advance(3, &device)), [false, false, false, true, true, false]);
        assert_eq!(hidden(cache.advance(1, &device))[4..], [true, true, false, false]);
        // Past the mask's 64 slots.
        assert_eq!(hidden(cache.advance(70, &device)).iter().filter(|hidden| **hidden).count(), 2);
        cache.keep(&[1]);
        assert_eq!(hidden(cache.advance(1, &device))[..3], [true, true, false]);
        cache.first = vec![0];
        assert!(cache.advance(1, &device).is_none());
    }
}
