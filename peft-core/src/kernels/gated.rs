//! Gated activation of the feed-forward block: `silu(g) ∘ u` (SwiGLU without its projections, arXiv 2002.05202), where
//! `g` and `u` are the two halves of the columns.
//!
//! The backward needs `g` and `u`, and nothing that was computed from them.

use super::backend::{Kernels, has_graph, lift, served, with_backend};
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::tensor::{Tensor, activation::silu};

/// `silu(g) ∘ u` of `[g u]`: `[tokens, 2·intermediate]` → `[tokens, intermediate]`.
pub fn silu_gate(gate_up: Tensor<2>) -> Tensor<2> {
    match served(&gate_up.device(), gate_up.dtype()) {
        Some(served) => with_backend!(served, fused(gate_up)),
        None => {
            let (gate, up) = split_gate(gate_up);
            plain(gate, up)
        }
    }
}

/// The halves of the columns.
pub(super) fn split_gate(gate_up: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
    let half = gate_up.dims()[1] / 2;
    (gate_up.clone().narrow(1, 0, half), gate_up.narrow(1, half, half))
}

/// The composition of burn's operations.
pub(super) fn plain(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    silu(gate) * up
}

fn fused<B: Kernels>(gate_up: Tensor<2>) -> Tensor<2> {
    if !has_graph(&gate_up) {
        return B::tensor(B::silu_gate(&B::primitive(gate_up)));
    }
    let gate_up = lift::<B, 2>(gate_up);
    let prepared = GateBackward.prepare::<NoCheckpointing>([gate_up.node()]).compute_bound().stateful();
    let gate_up = gate_up.into_primitive();
    let y = B::silu_gate(&gate_up);
    B::tracked_tensor(match prepared {
        OpsKind::Tracked(prepared) => prepared.finish(gate_up, y),
        OpsKind::UnTracked(prepared) => prepared.finish(y),
    })
}

#[derive(Debug)]
struct GateBackward;

impl<B: Kernels> Backward<B, 1> for GateBackward {
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        if let [Some(node)] = ops.parents {
            grads.register::<B>(node.id, B::silu_gate_backward(&ops.state, dy, false).x);
        }
    }
}
