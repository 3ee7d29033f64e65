//! Gated activation of the feed-forward block: `silu(gate) ∘ up` (SwiGLU without its projections, arXiv 2002.05202).

use burn::tensor::{Tensor, activation::silu};

/// `silu(gate) ∘ up`, elementwise, both `[tokens, intermediate]`.
pub fn silu_gate(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    silu(gate) * up
}
