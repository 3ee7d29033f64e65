//! Grouped causal attention: `softmax(Q·Kᵀ/√d + mask)·V`, where `group` query heads share one key/value head
//! (Ainslie et al., arXiv 2305.13245).
//!
//! The queries of a group are laid under one another, so keys and values are read once and never repeated.

use super::as_dtype;
use burn::tensor::{DType, Device, Tensor, TensorData, activation::softmax};

/// Attends from `q` to `k` and `v`.
///
/// # Shapes
/// `q` `[batch, heads, time, head_dim]`, `k` and `v` `[batch, kv_heads, keys, head_dim]` with `heads` a multiple of
/// `kv_heads`, `mask` `[batch or 1, 1, 1, time, keys]` added to the scores (0 or −∞), f32. Returns the shape of `q`.
pub fn attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, mask: Option<Tensor<5>>) -> Tensor<4> {
    let dtype = q.dtype();
    let [batch, heads, time, head_dim] = q.dims();
    let [_, kv_heads, keys, _] = k.dims();
    let group = heads / kv_heads;

    let q = q.mul_scalar((head_dim as f64).powf(-0.5)).reshape([batch, kv_heads, group * time, head_dim]);
    let scores = as_dtype(q.matmul(k.swap_dims(2, 3)), DType::F32);
    let scores = match mask {
        Some(mask) => {
            let scores = scores.reshape([batch, kv_heads, group, time, keys]) + mask;
            scores.reshape([batch, kv_heads, group * time, keys])
        }
        None => scores,
    };
    let weights = as_dtype(softmax(scores, 3), dtype);
    weights.matmul(v).reshape([batch, heads, time, head_dim])
}

/// The additive mask of causal attention, `[1, 1, 1, time, keys]`.
///
/// Query `t` stands at position `keys − time + t` and sees keys `p` with `position − window < p ≤ position`; without a
/// window all keys up to its own. Returns `None` where nothing is hidden.
pub fn causal_mask(time: usize, keys: usize, window: Option<usize>, device: &Device) -> Option<Tensor<5>> {
    let first = keys - time;
    if time == 1 && window.is_none_or(|window| keys <= window) {
        return None;
    }
    let mut mask = vec![0f32; time * keys];
    for (t, row) in mask.chunks_exact_mut(keys).enumerate() {
        let position = first + t;
        row[position + 1..].fill(f32::NEG_INFINITY);
        if let Some(window) = window {
            row[..(position + 1).saturating_sub(window)].fill(f32::NEG_INFINITY);
        }
    }
    Some(Tensor::from_data(TensorData::new(mask, [1, 1, 1, time, keys]), (device, DType::F32)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mask_shows_the_last_window_keys() {
        let mask = causal_mask(2, 4, Some(2), &Device::flex()).unwrap();
        let mask: Vec<f32> = mask.try_into_vec_as().unwrap();
        let hidden: Vec<bool> = mask.iter().map(|v| *v != 0.0).collect();
        // Positions 2 and 3 of 4 keys, two keys visible each.
        assert_eq!(hidden, [true, false, false, true, true, true, false, false]);
    }

    #[test]
    fn a_group_shares_its_key_head() {
        let device = Device::flex();
        let tensor =
            |v: Vec<f32>, shape: [usize; 4]| Tensor::<4>::from_data(TensorData::new(v, shape), &device);
        // Two query heads over one key head whose second key is twice as far along the query.
        let q = tensor(vec![1.0, 0.0], [1, 2, 1, 1]);
        let k = tensor(vec![0.0, 2f32.ln()], [1, 1, 2, 1]);
        let v = tensor(vec![0.0, 3.0], [1, 1, 2, 1]);
        let out: Vec<f32> = attention(q, k, v, None).try_into_vec_as().unwrap();
        // softmax(0, ln 2) = (1/3, 2/3) gives 2; softmax(0, 0) gives 1.5.
        assert!((out[0] - 2.0).abs() < 1e-6 && (out[1] - 1.5).abs() < 1e-6, "{out:?}");
    }
}
