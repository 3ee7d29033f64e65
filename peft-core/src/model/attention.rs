//! Self-attention of a decoder layer.

use super::cache::KeyValueCache;
use super::context::{Context, Layout, Sequences};
use crate::kernels::{
    AttentionShape, LinearInput, Residual, attends_jointly, attention, joint_attention, rms_norm, rotate,
};
use crate::projection::{Parameter, Projection, Tape, project};
use burn::tensor::Tensor;

/// Projections to queries, keys and values, the attention between them, and the projection back.
#[derive(Debug, Clone)]
pub struct Attention {
    pub(super) q_proj: Projection,
    pub(super) k_proj: Projection,
    pub(super) v_proj: Projection,
    pub(super) o_proj: Projection,
    /// Norm weights over the features of each q and k head.
    pub(super) qk_norm: Option<(Parameter, Parameter)>,
    pub(super) head_dim: usize,
    pub(super) epsilon: f64,
    /// Whether q and k are rotated.
    pub(super) rotary: bool,
    /// How many keys a query sees.
    pub(super) window: Option<usize>,
}

impl Attention {
    /// `residual + attention(input)`, `[tokens, hidden]`.
    pub(super) fn forward(
        &self,
        tape: &Tape,
        input: LinearInput,
        residual: Residual,
        context: &Context,
        cache: Option<&mut KeyValueCache>,
    ) -> Tensor<2> {
        let qkv = project(tape, &[&self.q_proj, &self.k_proj, &self.v_proj], input, None);
        let shape = self.shape();
        let trains_norm = self.qk_norm.as_ref().is_some_and(|(q, k)| q.trainable || k.trainable);
        let device = qkv.device();
        let y = if !trains_norm && attends_jointly(&shape, &device, qkv.dtype()) {
            let norms = self.qk_norm.as_ref().map(|(q, k)| (q.value.clone(), k.value.clone()));
            match cache {
                Some(cache) => cache.attend_jointly(&shape, qkv, self.rotary, norms, context),
                None => {
                    let rotation = self.rotary.then(|| context.rotation());
                    joint_attention(&shape, qkv, rotation, norms, context.visibility())
                }
            }
        } else {
            self.plain(tape, qkv, context, cache)
        };
        project(tape, &[&self.o_proj], LinearInput::Plain(y), Some(residual))
    }

    fn shape(&self) -> AttentionShape {
        AttentionShape {
            heads: self.q_proj.dims()[0] / self.head_dim,
            kv_heads: self.k_proj.dims()[0] / self.head_dim,
            head_dim: self.head_dim,
            window: self.window,
            epsilon: self.epsilon,
        }
    }

    /// Attention of joint queries, keys and values as a plain composition.
    fn plain(
        &self,
        tape: &Tape,
        qkv: Tensor<2>,
        context: &Context,
        cache: Option<&mut KeyValueCache>,
    ) -> Tensor<2> {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape();
        let (q_width, kv_width) = (heads * head_dim, kv_heads * head_dim);
        let q = qkv.clone().narrow(1, 0, q_width);
        let k = qkv.clone().narrow(1, q_width, kv_width);
        let v = qkv.narrow(1, q_width + kv_width, kv_width);
        let (q_norm, k_norm) = self.qk_norm.as_ref().map(|(q, k)| (q, k)).unzip();
        let (q, k) = (self.normed(tape, q, q_norm), self.normed(tape, k, k_norm));
        match context.layout() {
            Layout::Padded(sequences) => self.attend([q, k, v], sequences, cache),
            Layout::Packed(packed) => {
                packed.within_segments([q, k, v], |qkv, sequences| self.attend(qkv, sequences, None))
            }
        }
    }

    /// Each head normed, where the family does so: `[tokens, heads · head_dim]`.
    fn normed(&self, tape: &Tape, y: Tensor<2>, norm: Option<&Parameter>) -> Tensor<2> {
        let Some(weight) = norm else { return y };
        let [tokens, features] = y.dims();
        let heads = y.reshape([tokens * features / self.head_dim, self.head_dim]);
        rms_norm(heads, tape.read(weight), self.epsilon).reshape([tokens, features])
    }

    /// Attention between the tokens of each sequence, `[batch · time, features]` each.
    fn attend(
        &self,
        qkv: [Tensor<2>; 3],
        sequences: &Sequences,
        cache: Option<&mut KeyValueCache>,
    ) -> Tensor<2> {
        let [mut q, mut k, v] = qkv.map(|y| self.heads(y, sequences));
        if self.rotary {
            let rope = &sequences.rope;
            q = rotate(q, rope.cos.clone(), rope.sin.clone());
            k = rotate(k, rope.cos.clone(), rope.sin.clone());
        }
        let y = match cache {
            Some(cache) => cache.attend(q, [k, v], sequences, self.window),
            None => attention(q, k, v, sequences.mask(self.window)),
        };
        let [batch, heads, time, head_dim] = y.dims();
        y.swap_dims(1, 2).reshape([batch * time, heads * head_dim])
    }

    /// `[batch · time, heads · head_dim]` → `[batch, heads, time, head_dim]`.
    fn heads(&self, y: Tensor<2>, sequences: &Sequences) -> Tensor<4> {
        let heads = y.dims()[1] / self.head_dim;
        y.reshape([sequences.batch, sequences.time, heads, self.head_dim]).swap_dims(1, 2)
    }
}
