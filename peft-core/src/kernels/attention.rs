//! Grouped causal attention: `softmax(Q·Kᵀ/√d + mask)·V`, where `group` query heads share one key/value head
//! (Ainslie et al., arXiv 2305.13245).
//!
//! [`joint_attention`] takes queries, keys and values side by side as the projection leaves them, norms and rotates the
//! heads and attends in tiles (FlashAttention, Dao, arXiv 2307.08691): nothing of the size tokens × tokens is held. With
//! `ℓ_i = log Σ_j exp(s_ij)` and `D_i = Σ dO_i ∘ O_i` its backward computes `P = exp(S − ℓ)` and `dS = P ∘ (dO·Vᵀ − D)`
//! again tile by tile; it needs the raw inputs, `O` and `ℓ`.
//!
//! [`cached_attention`] does the same for the next tokens of rows whose keys and values are kept, and keeps theirs.
//!
//! [`attention`] is the plain composition over heads that are laid out already, for what no backend has kernels for.

use super::as_dtype;
use super::backend::{Kernels, Served, has_graph, lift, served, with_backend};
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Device, Int, Tensor, TensorData, activation::softmax};
use std::ops::Range;

/// The heads of a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Features of a head.
    pub head_dim: usize,
    /// How many keys a query sees, itself included.
    pub window: Option<usize>,
    /// ε of the heads' norm.
    pub epsilon: f64,
}

impl AttentionShape {
    /// Columns of the joint queries, keys and values.
    pub fn columns(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// Which tokens see which, for sequences anywhere among the tokens: token `i` sees `j` where `first[i] ≤ j ≤ i`.
#[derive(Debug, Clone)]
pub struct Visibility {
    /// For each token, the first one of its sequence.
    pub first: Tensor<1, Int>,
    /// For each token, one past the last one of its sequence.
    pub last: Tensor<1, Int>,
}

impl Visibility {
    /// The sequences at `segments` (ascending, disjoint) of `tokens` tokens. A token in none of them sees itself.
    pub fn new(segments: &[Range<usize>], tokens: usize, device: &Device) -> Self {
        let mut first: Vec<i32> = (0..tokens as i32).collect();
        let mut last: Vec<i32> = (1..=tokens as i32).collect();
        for segment in segments {
            first[segment.clone()].fill(segment.start as i32);
            last[segment.clone()].fill(segment.end as i32);
        }
        let tensor = |v| Tensor::from_data(TensorData::new(v, [tokens]), (device, DType::I32));
        Self { first: tensor(first), last: tensor(last) }
    }
}

/// What the heads are turned by: cosine and sine of each token's angles, `[tokens, head_dim / 2]`, f32.
#[derive(Debug, Clone)]
pub struct Rotation {
    /// Cosines.
    pub cos: Tensor<2>,
    /// Sines.
    pub sin: Tensor<2>,
}

/// Whether [`joint_attention`] and [`cached_attention`] have kernels for these heads.
pub fn attends_jointly(shape: &AttentionShape, device: &Device, dtype: DType) -> bool {
    fn attends<B: Kernels>(shape: &AttentionShape, dtype: DType) -> bool {
        B::attends(shape, dtype)
    }
    served(device, dtype).is_some_and(|served| with_backend!(served, attends(shape, dtype)))
}

/// Attention within sequences.
///
/// # Shapes
/// `qkv` `[tokens, columns]`: the features of all query heads, all key heads, all value heads. `norms` are the frozen
/// weights `[1, head_dim]` of the norm over each query and key head before it is turned. Returns `[tokens, heads ·
/// head_dim]`.
///
/// # Panics
/// Where [`attends_jointly`] says no.
pub fn joint_attention(
    shape: &AttentionShape,
    qkv: Tensor<2>,
    rotation: Option<&Rotation>,
    norms: Option<(Tensor<2>, Tensor<2>)>,
    visibility: &Visibility,
) -> Tensor<2> {
    let served = served(&qkv.device(), qkv.dtype()).expect("asked before");
    with_backend!(served, fused(shape, qkv, rotation, norms, visibility))
}

/// The inputs of [`joint_attention`] as a backend has them.
#[derive(Debug, Clone)]
pub(super) struct AttentionInputs<B: Kernels> {
    pub qkv: FloatTensor<B>,
    pub rotation: Option<(FloatTensor<B>, FloatTensor<B>)>,
    pub norms: Option<(FloatTensor<B>, FloatTensor<B>)>,
    pub first: IntTensor<B>,
    /// The CPU's kernels do without.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub last: IntTensor<B>,
}

fn fused<B: Kernels>(
    shape: &AttentionShape,
    qkv: Tensor<2>,
    rotation: Option<&Rotation>,
    norms: Option<(Tensor<2>, Tensor<2>)>,
    visibility: &Visibility,
) -> Tensor<2> {
    let dtype = qkv.dtype();
    let inputs = |qkv| AttentionInputs::<B> {
        qkv,
        rotation: rotation_of::<B>(rotation),
        norms: norms_of::<B>(norms, dtype),
        first: B::integers(visibility.first.clone()),
        last: B::integers(visibility.last.clone()),
    };
    if !has_graph(&qkv) {
        return B::tensor(B::attend(shape, &inputs(B::primitive(qkv))).0);
    }
    let qkv = lift::<B, 2>(qkv);
    let prepared = AttentionBackward(shape.clone()).prepare::<NoCheckpointing>([qkv.node()]);
    let prepared = prepared.compute_bound().stateful();
    let inputs = inputs(qkv.into_primitive());
    let (output, log_denominators) = B::attend(shape, &inputs);
    B::tracked_tensor(match prepared {
        OpsKind::Tracked(prepared) => prepared.finish((inputs, output.clone(), log_denominators), output),
        OpsKind::UnTracked(prepared) => prepared.finish(output),
    })
}

type Pair<B> = Option<(FloatTensor<B>, FloatTensor<B>)>;

fn rotation_of<B: Kernels>(rotation: Option<&Rotation>) -> Pair<B> {
    rotation.map(|Rotation { cos, sin }| (B::primitive(cos.clone()), B::primitive(sin.clone())))
}

fn norms_of<B: Kernels>(norms: Option<(Tensor<2>, Tensor<2>)>, dtype: DType) -> Pair<B> {
    norms.map(|(q, k)| (B::primitive(as_dtype(q, dtype)), B::primitive(as_dtype(k, dtype))))
}

/// What is kept of rows that are continued together: the keys, normed and turned, and the values of their tokens.
#[derive(Debug, Clone)]
pub struct KeyValues {
    /// `[rows, kv_heads, slots, head_dim]`; slots after the filled ones may hold anything.
    pub keys: Tensor<4>,
    /// As the keys.
    pub values: Tensor<4>,
    /// Slots filled, the same in all rows.
    pub length: usize,
    /// The slot of each row's first token, `[rows]`, 32 bits; before it is padding.
    pub first: Tensor<1, Int>,
}

/// The next tokens of rows, as a backend has them.
pub(super) struct CachedInputs<B: Kernels> {
    pub qkv: FloatTensor<B>,
    pub rotation: Pair<B>,
    pub norms: Pair<B>,
    pub first: IntTensor<B>,
    /// Slots filled before.
    pub length: usize,
}

/// Keeps the keys and values of the next tokens of each row, in the slots after `kept.length`, which must be there.
///
/// # Shapes
/// `qkv` `[rows · time, columns]` and the others as in [`joint_attention`].
///
/// # Panics
/// Where [`attends_jointly`] says no.
pub fn keep_keys(
    shape: &AttentionShape,
    qkv: Tensor<2>,
    rotation: Option<&Rotation>,
    norms: Option<(Tensor<2>, Tensor<2>)>,
    kept: KeyValues,
) -> KeyValues {
    fn keep<B: Kernels>(shape: &AttentionShape, new: NewTokens, kept: KeyValues) -> KeyValues {
        extended::<B, _>(new, kept, |inputs, cache| ((), B::keep_keys(shape, inputs, cache))).1
    }
    let new = NewTokens { qkv, rotation, norms };
    with_backend!(new.served(), keep(shape, new, kept))
}

/// Keeps the keys and values of the next tokens of each row as [`keep_keys`] does, and attends from these tokens: each sees
/// its row's tokens up to itself, as far as the window goes. Padding sees nothing of its row; what it gets is a number.
///
/// Returns `[rows · time, heads · head_dim]` beside what is kept; no graph is made.
pub fn cached_attention(
    shape: &AttentionShape,
    qkv: Tensor<2>,
    rotation: Option<&Rotation>,
    norms: Option<(Tensor<2>, Tensor<2>)>,
    kept: KeyValues,
) -> (Tensor<2>, KeyValues) {
    fn attend<B: Kernels>(shape: &AttentionShape, new: NewTokens, kept: KeyValues) -> (Tensor<2>, KeyValues) {
        let (y, kept) = extended::<B, _>(new, kept, |inputs, cache| B::attend_cached(shape, inputs, cache));
        (B::tensor(y), kept)
    }
    let new = NewTokens { qkv, rotation, norms };
    with_backend!(new.served(), attend(shape, new, kept))
}

/// The next tokens of rows.
struct NewTokens<'a> {
    qkv: Tensor<2>,
    rotation: Option<&'a Rotation>,
    norms: Option<(Tensor<2>, Tensor<2>)>,
}

impl NewTokens<'_> {
    /// The kernels for them, of which [`attends_jointly`] has told.
    fn served(&self) -> Served {
        served(&self.qkv.device(), self.qkv.dtype()).expect("asked before")
    }
}

/// What `work` makes of the new tokens and of the cache, and what is kept then.
fn extended<B: Kernels, R>(
    NewTokens { qkv, rotation, norms }: NewTokens,
    kept: KeyValues,
    work: impl FnOnce(&CachedInputs<B>, [FloatTensor<B>; 2]) -> (R, [FloatTensor<B>; 2]),
) -> (R, KeyValues) {
    let time = qkv.dims()[0] / kept.keys.dims()[0];
    let inputs = CachedInputs::<B> {
        rotation: rotation_of::<B>(rotation),
        norms: norms_of::<B>(norms, qkv.dtype()),
        qkv: B::primitive(qkv),
        first: B::integers(kept.first.clone()),
        length: kept.length,
    };
    let (result, cache) = work(&inputs, [B::primitive(kept.keys), B::primitive(kept.values)]);
    let [keys, values] = cache.map(B::tensor);
    (result, KeyValues { keys, values, length: kept.length + time, first: kept.first })
}

#[derive(Debug)]
struct AttentionBackward(AttentionShape);

impl<B: Kernels> Backward<B, 1> for AttentionBackward {
    type State = (AttentionInputs<B>, FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let (inputs, output, log_denominators) = ops.state;
        if let [Some(node)] = ops.parents {
            let dqkv = B::attend_backward(&self.0, &inputs, &output, &log_denominators, &dy);
            grads.register::<B>(node.id, dqkv);
        }
    }
}

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
