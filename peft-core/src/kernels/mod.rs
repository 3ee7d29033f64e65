//! The hot operations, one file each.
//!
//! Every operation is a plain composition of burn operations behind the signature that the model calls, so it runs
//! on any device burn has and differentiates by burn's autodiff. Activations are rank-2 `[tokens, features]` with the
//! batch flattened into the first axis; reductions (norms, softmax, losses) are in f32 whatever the input type.

mod adamw;
mod attention;
mod cross_entropy;
mod gated;
mod linear;
mod rms_norm;
mod rotary;
mod segments;

pub use adamw::{AdamW, AdamWState};
pub use attention::{attention, causal_mask};
pub use cross_entropy::{CrossEntropy, cross_entropy};
pub use gated::silu_gate;
pub use linear::{LowRankTerm, adapted_linear};
pub use rms_norm::rms_norm;
pub use rotary::rotate;
pub use segments::{SegmentGroup, group_segments};

use burn::tensor::{DType, Tensor};

/// `tensor` as `dtype`, untouched where it has that type already.
pub fn as_dtype<const D: usize>(tensor: Tensor<D>, dtype: DType) -> Tensor<D> {
    if tensor.dtype() == dtype { tensor } else { tensor.cast(dtype) }
}
