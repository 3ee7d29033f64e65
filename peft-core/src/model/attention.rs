//! Self-attention of a decoder layer.

use super::cache::KeyValueCache;
use super::decoder::Context;
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
        let mut q = self.heads(tape, &self.q_proj, q_norm, x.clone(), context);
        let mut k = self.heads(tape, &self.k_proj, k_norm, x.clone(), context);
        let v = self.heads(tape, &self.v_proj, None, x, context);
        if self.rotary {
            q = rotate(q, context.rope.cos.clone(), context.rope.sin.clone());
            k = rotate(k, context.rope.cos.clone(), context.rope.sin.clone());
        }
        let (k, v) = match cache {
            Some(cache) => cache.append(k, v),
            None => (k, v),
        };
        let y = attention(q, k, v, context.mask(self.window));
        let [batch, heads, time, head_dim] = y.dims();
        let y = y.swap_dims(1, 2).reshape([batch * time, heads * head_dim]);
        self.o_proj.forward(tape, y, Some(residual))
    }

    /// Projects to heads, `[batch, heads, time, head_dim]`, normed where the family does so.
    fn heads(
        &self,
        tape: &Tape,
        projection: &Projection,
        norm: Option<&Parameter>,
        x: Tensor<2>,
        context: &Context,
    ) -> Tensor<4> {
        let y = projection.forward(tape, x, None);
        let heads = y.dims()[1] / self.head_dim;
        let y = match norm {
            Some(weight) => {
                let rows = y.reshape([context.batch * context.time * heads, self.head_dim]);
                rms_norm(rows, tape.read(weight), self.epsilon)
            }
            None => y,
        };
        let y: Tensor<4> = y.reshape([context.batch, context.time, heads, self.head_dim]);
        y.swap_dims(1, 2)
    }
}
