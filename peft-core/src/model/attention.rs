//! Self-attention of a decoder layer.

use super::cache::KeyValueCache;
use super::context::{Context, Layout, Sequences};
use crate::kernels::{attention, rms_norm, rotate};
use crate::projection::{Parameter, Projection, Tape};
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
    /// `x` `[tokens, hidden]` → `residual + attention(x)`, `[tokens, hidden]`.
    pub(super) fn forward(
        &self,
        tape: &Tape,
        x: Tensor<2>,
        residual: Tensor<2>,
        context: &Context,
        cache: Option<&mut KeyValueCache>,
    ) -> Tensor<2> {
        let (q_norm, k_norm) = self.qk_norm.as_ref().map(|(q, k)| (q, k)).unzip();
        let q = self.features(tape, &self.q_proj, q_norm, x.clone());
        let k = self.features(tape, &self.k_proj, k_norm, x.clone());
        let v = self.features(tape, &self.v_proj, None, x);
        let y = match &context.layout {
            Layout::Padded(sequences) => self.attend([q, k, v], sequences, cache),
            Layout::Packed(packed) => {
                packed.within_segments([q, k, v], |qkv, sequences| self.attend(qkv, sequences, None))
            }
        };
        self.o_proj.forward(tape, y, Some(residual))
    }

    /// Projects, `[tokens, heads · head_dim]`, with each head normed where the family does so.
    fn features(
        &self,
        tape: &Tape,
        projection: &Projection,
        norm: Option<&Parameter>,
        x: Tensor<2>,
    ) -> Tensor<2> {
        let y = projection.forward(tape, x, None);
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
