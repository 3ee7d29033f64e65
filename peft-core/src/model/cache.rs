//! Keys and values of the tokens seen so far, for generation in batches.

use super::context::{Context, Sequences};
use crate::kernels::{AttentionShape, KeyValues, attention, cached_attention, joint_attention, keep_keys};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

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
    pub(super) length: usize,
}

impl Cache {
    /// Empty, for as many rows as `padding` has entries, each of which is how many tokens of padding a row begins with.
    pub(super) fn new(layers: usize, padding: Vec<usize>, device: &Device) -> Self {
        let first = indices(&padding, DType::I32, device);
        let layer = |_| KeyValueCache { buffers: None, first: first.clone(), length: 0 };
        Self { layers: (0..layers).map(layer).collect(), first: padding, length: 0 }
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

    /// Keeps the given rows and forgets the others.
    pub fn keep(&mut self, rows: &[usize]) {
        self.first = rows.iter().map(|row| self.first[*row]).collect();
        let Some(device) = self.layers.first().map(|layer| layer.first.device()) else { return };
        let (rows, first) = (indices(rows, DType::I64, &device), indices(&self.first, DType::I32, &device));
        for layer in &mut self.layers {
            layer.keep(&rows, &first);
        }
    }
}

fn indices(values: &[usize], dtype: DType, device: &Device) -> Tensor<1, Int> {
    let values: Vec<i64> = values.iter().map(|value| *value as i64).collect();
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), (device, dtype))
}

/// One layer's keys and values in a buffer that doubles when full, so that appending a token copies one token.
pub struct KeyValueCache {
    /// `[rows, kv_heads, slots, head_dim]`.
    buffers: Option<(Tensor<4>, Tensor<4>)>,
    /// The slot of each row's first token, 32 bits.
    first: Tensor<1, Int>,
    length: usize,
}

impl KeyValueCache {
    /// As [`joint_attention`] and [`cached_attention`]: from new tokens to all that is held of their rows.
    pub(super) fn attend_jointly(
        &mut self,
        shape: &AttentionShape,
        qkv: Tensor<2>,
        rotary: bool,
        norms: Option<(Tensor<2>, Tensor<2>)>,
        context: &Context,
    ) -> Tensor<2> {
        let rows = self.first.dims()[0];
        let time = qkv.dims()[0] / rows;
        let rotation = rotary.then(|| context.rotation());
        let dims = [rows, shape.kv_heads, self.length + time, shape.head_dim];
        let place = (&qkv.device(), qkv.dtype());
        let (keys, values) = self.buffers.take().unzip();
        let [keys, values] = [keys, values].map(|buffer| with_room(buffer, self.length, dims, place));
        let kept = KeyValues { keys, values, length: self.length, first: self.first.clone() };
        // Tokens that have none before them attend among themselves, in tiles.
        let (y, kept) = if self.length == 0 && time > 1 {
            let y = joint_attention(shape, qkv.clone(), rotation, norms.clone(), context.visibility());
            (y, keep_keys(shape, qkv, rotation, norms, kept))
        } else {
            cached_attention(shape, qkv, rotation, norms, kept)
        };
        self.buffers = Some((kept.keys, kept.values));
        self.length = kept.length;
        y
    }

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

    fn keep(&mut self, rows: &Tensor<1, Int>, first: &Tensor<1, Int>) {
        self.first = first.clone();
        self.buffers = self
            .buffers
            .take()
            .map(|(keys, values)| (keys.select(0, rows.clone()), values.select(0, rows.clone())));
    }
}

/// `buffer`, of which `length` slots are filled, if it has the slots that `dims` asks for, or else a larger one.
fn with_room(
    buffer: Option<Tensor<4>>,
    length: usize,
    dims: [usize; 4],
    place: (&Device, DType),
) -> Tensor<4> {
    let [rows, heads, needed, head_dim] = dims;
    match buffer {
        Some(buffer) if buffer.dims()[2] >= needed => buffer,
        full => {
            let fresh = Tensor::zeros([rows, heads, capacity(needed), head_dim], place);
            match full {
                Some(old) => {
                    fresh.slice_assign([0..rows, 0..heads, 0..length, 0..head_dim], old.narrow(2, 0, length))
                }
                None => fresh,
            }
        }
    }
}

/// `buffer`, of which `length` slots are filled, with `new` in the slots after these; a larger one if they do not fit.
fn written(buffer: Option<Tensor<4>>, length: usize, new: &Tensor<4>) -> Tensor<4> {
    let [rows, heads, time, head_dim] = new.dims();
    let needed = length + time;
    let buffer = with_room(buffer, length, [rows, heads, needed, head_dim], (&new.device(), new.dtype()));
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
        let first = indices(&[0], DType::I32, &Device::flex());
        let mut cache = KeyValueCache { buffers: None, first, length: 0 };
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
    fn padding_follows_the_rows_that_are_kept() {
        let mut cache = Cache::new(1, vec![0, 2, 1], &Device::flex());
        let on_device = |cache: &Cache| cache.layers[0].first.clone().try_into_vec_as::<i64>().unwrap();
        assert_eq!(on_device(&cache), [0, 2, 1]);
        cache.keep(&[1, 2]);
        assert_eq!((cache.first(), on_device(&cache)), (&[2, 1][..], vec![2, 1]));
        cache.keep(&[1]);
        assert_eq!((cache.rows(), cache.first(), on_device(&cache)), (1, &[1][..], vec![1]));
    }
}
