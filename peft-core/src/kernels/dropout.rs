//! Dropout (Srivastava et al., JMLR 15, 2014) without a mask in memory: whether an element stays follows from a key and its
//! place, so that every device drops the same ones and the backward finds them again.
//!
//! Element `(i, j)` becomes 0 where word `j mod 4` of Philox4x32-10 under the key, with the counter `(⌊j/4⌋, i, 0, 0)`, is
//! below `p·2³²`, else `x/(1 − p)`.

use super::as_dtype;
use super::backend::{Kernels, has_graph, lift, served, with_backend};
use super::cpu;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::{DType, Tensor, TensorData};

/// Which elements are dropped.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability of each, below 1.
    pub p: f64,
    /// Names the draws.
    pub key: u64,
}

impl Dropout {
    /// Random words below this drop their element.
    pub(super) fn threshold(&self) -> u32 {
        (self.p * 2f64.powi(32)) as u32
    }

    /// What the elements that stay are multiplied by.
    pub(super) fn kept(&self) -> f32 {
        (1.0 / (1.0 - self.p)) as f32
    }

    /// The key's halves, the low one first.
    pub(super) fn words(&self) -> [u32; 2] {
        [self.key as u32, (self.key >> 32) as u32]
    }

    /// The factors of all elements on the host.
    fn mask(&self, [rows, columns]: [usize; 2]) -> TensorData {
        let mut mask = vec![0f32; rows * columns];
        cpu::dropout::apply(&mut mask, &vec![1f32; rows * columns], columns, self, false);
        TensorData::new(mask, [rows, columns])
    }
}

/// `x` with some elements dropped.
pub fn dropout(x: Tensor<2>, dropout: Dropout) -> Tensor<2> {
    match served(&x.device(), x.dtype()) {
        Some(served) => with_backend!(served, fused(x, dropout)),
        None => plain(x, dropout),
    }
}

/// The composition of burn's operations.
pub(super) fn plain(x: Tensor<2>, dropout: Dropout) -> Tensor<2> {
    let (device, dtype) = (x.device().without_autodiff(), x.dtype());
    let mask = Tensor::from_data(dropout.mask(x.dims()), (&device, DType::F32));
    x * as_dtype(mask, dtype)
}

fn fused<B: Kernels>(x: Tensor<2>, dropout: Dropout) -> Tensor<2> {
    if !has_graph(&x) {
        return B::tensor(B::dropout(&B::primitive(x), &dropout));
    }
    let x = lift::<B, 2>(x);
    let prepared = DropoutBackward.prepare::<NoCheckpointing>([x.node()]).compute_bound().stateful();
    let y = B::dropout(&x.into_primitive(), &dropout);
    B::tracked_tensor(match prepared {
        OpsKind::Tracked(prepared) => prepared.finish(dropout, y),
        OpsKind::UnTracked(prepared) => prepared.finish(y),
    })
}

#[derive(Debug)]
struct DropoutBackward;

impl<B: Kernels> Backward<B, 1> for DropoutBackward {
    type State = Dropout;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        if let [Some(node)] = ops.parents {
            grads.register::<B>(node.id, B::dropout(&dy, &ops.state));
        }
    }
}
