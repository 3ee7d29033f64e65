//! Where a backward starts from a known gradient instead of a loss.

use super::backend::{Kernels, lift, served, with_backend};
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients as Container;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::tensor::{Gradients, Tensor};

/// The gradients that follow from `dy`, the gradient of the result `y` (of an autodiff device), `dy` without a graph.
pub fn backward_from(y: Tensor<2>, dy: Tensor<2>) -> Gradients {
    match served(&y.device(), y.dtype()) {
        Some(served) => with_backend!(served, seeded(y, dy)),
        None => (y * dy).sum().backward(),
    }
}

fn seeded<B: Kernels>(y: Tensor<2>, dy: Tensor<2>) -> Gradients {
    let root = Tensor::<1>::zeros([1], &dy.device());
    let y = lift::<B, 2>(y);
    let prepared = Seed.prepare::<NoCheckpointing>([y.node()]).compute_bound().stateful();
    let root: Tensor<1> = B::tracked_tensor(match prepared {
        OpsKind::Tracked(prepared) => prepared.finish(B::primitive(dy), B::primitive(root)),
        OpsKind::UnTracked(prepared) => prepared.finish(B::primitive(root)),
    });
    root.backward()
}

#[derive(Debug)]
struct Seed;

impl<B: Kernels> Backward<B, 1> for Seed {
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Container, _: &mut Checkpointer) {
        if let [Some(node)] = ops.parents {
            grads.register::<B>(node.id, ops.state);
        }
    }
}
