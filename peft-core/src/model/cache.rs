//! Keys and values of the tokens seen so far, for generation.

use burn::tensor::Tensor;

/// One layer's keys and values in a buffer that doubles when full, so that appending a token copies one token.
#[derive(Default)]
pub struct KeyValueCache {
    buffers: Option<(Tensor<4>, Tensor<4>)>,
    length: usize,
}

impl KeyValueCache {
    /// Tokens held.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Appends the keys and values of new tokens, `[batch, kv_heads, time, head_dim]`, and returns all of them.
    pub fn append(&mut self, k: Tensor<4>, v: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let [batch, heads, time, head_dim] = k.dims();
        let needed = self.length + time;
        let grown = |buffer: Option<Tensor<4>>, like: &Tensor<4>| match buffer {
            Some(buffer) if buffer.dims()[2] >= needed => buffer,
            buffer => {
                let capacity = needed.next_power_of_two().max(64);
                let fresh = Tensor::zeros([batch, heads, capacity, head_dim], (&like.device(), like.dtype()));
                match buffer {
                    Some(old) => {
                        let held = old.narrow(2, 0, self.length);
                        fresh.slice_assign([0..batch, 0..heads, 0..self.length, 0..head_dim], held)
                    }
                    None => fresh,
                }
            }
        };
        let (keys, values) = self.buffers.take().unzip();
        let place = [0..batch, 0..heads, self.length..needed, 0..head_dim];
        let keys = grown(keys, &k).slice_assign(place.clone(), k);
        let values = grown(values, &v).slice_assign(place, v);
        self.length = needed;
        let seen = (keys.clone().narrow(2, 0, needed), values.clone().narrow(2, 0, needed));
        self.buffers = Some((keys, values));
        seen
    }
}
