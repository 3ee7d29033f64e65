//! Root-mean-square norm: `y = w ∘ x / √(mean(x²) + ε)` (Zhang and Sennrich, arXiv 1910.07467).
//!
//! With `r = 1/√(mean(x²) + ε)` the backward is `dx = r·(w∘dy) − x·r³·mean(w∘dy∘x)` and `dw = Σ dy∘x·r` over the rows.
//! It needs `x` and `w`; `r` is computed again.

use super::as_dtype;
use super::backend::{Kernels, has_graph, lift, served, with_backend};
use super::linear::FrontGradients;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, Tensor};

/// Normalises each row.
///
/// # Shapes
/// `x` `[rows, features]`, `weight` `[1, features]`. The norm is taken in f32 and cast back before the weight is
/// applied, as transformers does.
pub fn rms_norm(x: Tensor<2>, weight: Tensor<2>, epsilon: f64) -> Tensor<2> {
    match served(&x.device(), x.dtype()) {
        Some(served) => with_backend!(served, fused(x, weight, epsilon)),
        None => plain(x, weight, epsilon),
    }
}

/// The composition of burn's operations.
pub(super) fn plain(x: Tensor<2>, weight: Tensor<2>, epsilon: f64) -> Tensor<2> {
    let dtype = x.dtype();
    let x = as_dtype(x, DType::F32);
    let mean_square = x.clone().square().mean_dim(1);
    let normed = x / mean_square.add_scalar(epsilon).sqrt();
    as_dtype(normed, dtype) * as_dtype(weight, dtype)
}

fn fused<B: Kernels>(x: Tensor<2>, weight: Tensor<2>, epsilon: f64) -> Tensor<2> {
    let (epsilon, weight) = (epsilon as f32, as_dtype(weight, x.dtype()));
    if !has_graph(&x) && !has_graph(&weight) {
        return B::tensor(B::rms_norm(&B::primitive(x), &B::primitive(weight), epsilon));
    }
    let (x, weight) = (lift::<B, 2>(x), lift::<B, 2>(weight));
    let nodes = [x.node(), weight.node()];
    let prepared = NormBackward { epsilon }.prepare::<NoCheckpointing>(nodes).compute_bound().stateful();
    let (x, weight) = (x.into_primitive(), weight.into_primitive());
    let y = B::rms_norm(&x, &weight, epsilon);
    B::tracked_tensor(match prepared {
        OpsKind::Tracked(prepared) => prepared.finish((x, weight), y),
        OpsKind::UnTracked(prepared) => prepared.finish(y),
    })
}

#[derive(Debug)]
struct NormBackward {
    epsilon: f32,
}

impl<B: Kernels> Backward<B, 2> for NormBackward {
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let [of_x, of_weight] = ops.parents;
        let (x, weight) = ops.state;
        let wants_weight = of_weight.is_some();
        let FrontGradients { x: dx, weight: dw, .. } =
            B::rms_norm_backward(&x, &weight, self.epsilon, dy, None, wants_weight, false);
        if let Some(node) = of_x {
            grads.register::<B>(node.id, dx);
        }
        if let Some((node, dw)) = of_weight.zip(dw) {
            grads.register::<B>(node.id, dw);
        }
    }
}
