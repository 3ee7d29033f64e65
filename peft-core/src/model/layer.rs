//! One decoder layer: `x + attention(norm(x))`, then `x + mlp(norm(x))`.

use super::attention::Attention;
use super::cache::KeyValueCache;
use super::context::Context;
use crate::kernels::{LinearInput, Residual, Skip};
use crate::projection::{Parameter, Projection, Tape, project};
use burn::tensor::Tensor;

/// A decoder layer.
#[derive(Debug, Clone)]
pub struct Layer {
    pub(super) input_norm: Parameter,
    pub(super) attention: Attention,
    pub(super) post_attention_norm: Parameter,
    pub(super) gate_proj: Projection,
    pub(super) up_proj: Projection,
    pub(super) down_proj: Projection,
    pub(super) epsilon: f64,
}

impl Layer {
    /// `[tokens, hidden]` → `[tokens, hidden]`.
    pub fn forward(
        &self,
        tape: &Tape,
        x: Tensor<2>,
        context: &Context,
        cache: Option<&mut KeyValueCache>,
    ) -> Tensor<2> {
        // What a block's norm reads, and what is added to its result.
        let block = |x: Tensor<2>, norm: &Parameter| {
            let skip = Some(Skip::default());
            let weight = tape.read(norm);
            let input =
                LinearInput::Normed { x: x.clone(), weight, epsilon: self.epsilon, skip: skip.clone() };
            (input, Residual { value: x, skip })
        };
        let (input, residual) = block(x, &self.input_norm);
        let x = self.attention.forward(tape, input, residual, context, cache);
        let (input, residual) = block(x, &self.post_attention_norm);
        let gate_up = project(tape, &[&self.gate_proj, &self.up_proj], input, None);
        project(tape, &[&self.down_proj], LinearInput::Gated(gate_up), Some(residual))
    }

    /// The seven projections, in the order q, k, v, o, gate, up, down.
    pub fn projections(&self) -> [&Projection; 7] {
        let Attention { q_proj, k_proj, v_proj, o_proj, .. } = &self.attention;
        [q_proj, k_proj, v_proj, o_proj, &self.gate_proj, &self.up_proj, &self.down_proj]
    }

    /// The seven projections, to be changed.
    pub fn projections_mut(&mut self) -> [&mut Projection; 7] {
        let Attention { q_proj, k_proj, v_proj, o_proj, .. } = &mut self.attention;
        [q_proj, k_proj, v_proj, o_proj, &mut self.gate_proj, &mut self.up_proj, &mut self.down_proj]
    }

    /// The weights of the layer's norms.
    pub fn norms(&self) -> impl Iterator<Item = &Parameter> {
        let heads = self.attention.qk_norm.iter().flat_map(|(q, k)| [q, k]);
        [&self.input_norm, &self.post_attention_norm].into_iter().chain(heads)
    }

    /// Every parameter of the layer.
    pub fn parameters(&self) -> Vec<&Parameter> {
        self.norms().chain(self.projections().into_iter().flat_map(Projection::parameters)).collect()
    }

    /// Every parameter of the layer, to be changed.
    pub fn parameters_mut(&mut self) -> Vec<&mut Parameter> {
        let Attention { q_proj, k_proj, v_proj, o_proj, qk_norm, .. } = &mut self.attention;
        let projections =
            [q_proj, k_proj, v_proj, o_proj, &mut self.gate_proj, &mut self.up_proj, &mut self.down_proj];
        let norms = qk_norm.iter_mut().flat_map(|(q, k)| [q, k]);
        let norms = [&mut self.input_norm, &mut self.post_attention_norm].into_iter().chain(norms);
        norms.chain(projections.into_iter().flat_map(Projection::parameters_mut)).collect()
    }

    /// Whether training changes anything in the layer.
    pub fn is_trainable(&self) -> bool {
        self.parameters().iter().any(|parameter| parameter.trainable)
    }
}
