//! The hot operations, one file each.
//!
//! The model calls a handful of functions with tensors. Where the toolkit has kernels for the device and type (f32 on the
//! CPU; f32 and bf16 on CUDA) they run as one node of burn's graph each, with a backward written by hand that keeps as
//! little as it can; everywhere else the same function is a plain composition of burn's operations, which is also what
//! the kernels are tested against. Activations are rank-2 `[tokens, features]` with the batch flattened into the first
//! axis; reductions (norms, softmax, losses) are in f32 whatever the input type.

mod adamw;
mod aged_adamw;
mod attention;
mod backend;
mod basis;
mod cpu;
mod cross_entropy;
#[cfg(feature = "cuda")]
mod cuda;
mod dropout;
mod failure;
mod gated;
mod largest;
mod linear;
mod norm;
#[cfg(any(feature = "cuda", test))]
mod pool;
#[cfg(any(feature = "cuda", test))]
mod repeats;
mod rms_norm;
mod rotary;
mod seed;
mod segments;
mod settled;
mod skip;
mod sparse;
#[cfg(test)]
mod tests;

pub use adamw::{AdamW, AdamWState, Update};
pub use aged_adamw::{AgedAdamW, AgedUpdate};
pub use attention::{
    AttentionShape, KeyValues, Rotation, Visibility, attends_jointly, attention, cached_attention,
    causal_mask, joint_attention, keep_keys,
};
pub use basis::{RandomBasis, Span, combinations, combinations_backward};
pub use cross_entropy::{CrossEntropy, cross_entropy, head_loss};
#[cfg(feature = "cuda")]
pub use cuda::{fault, profile};
pub use dropout::{Dropout, dropout};
pub use failure::unless_failed;
pub use gated::silu_gate;
pub(crate) use largest::READ_BACK;
pub use largest::{largest, read_later};
pub use linear::{AdaptedLinear, LinearInput, LowRankTerm, Term, Up, adapted_linears};
pub(crate) use linear::{MOST_JOINT, RANK_STEP};
pub use norm::{Clip, clip_factor, clipped, sum_of_squares};
pub use rms_norm::rms_norm;
pub use rotary::rotate;
pub use seed::backward_from;
pub use segments::{SegmentGroup, group_segments};
pub use settled::settled;
pub use skip::{Residual, Skip};
pub use sparse::{
    BackwardObserver, PatternError, SparsePattern, SparseTerm, add_sparse, largest_products, sampled_products,
};

use burn::tensor::{DType, Device, Tensor};

/// What went wrong on a device since the program started, if anything did. Nothing goes wrong on the CPU.
#[cfg(not(feature = "cuda"))]
pub fn fault() -> Option<String> {
    None
}

/// Bytes of a GPU's memory that nobody uses, and all of them; `None` where they are not known, and for the CPU.
pub fn gpu_memory(device: &Device) -> Option<(u64, u64)> {
    #[cfg(feature = "cuda")]
    if *device != Device::flex() {
        return cuda::memory(device);
    }
    let _ = device;
    None
}

/// Lets go of the memory, of the CPU and of GPUs, that the kernels hold ready and that no one used since the last call, and
/// of what a GPU's pool has given up. Called once a step, it bounds what they hold by what a step needs.
pub fn trim_memory(device: &Device) {
    cpu::buffers::trim();
    #[cfg(feature = "cuda")]
    cuda::trim();
    // What is wrong with a device shows where its results are read.
    let _ = device.flush();
}

/// `tensor` as `dtype`, untouched where it has that type already.
pub fn as_dtype<const D: usize>(tensor: Tensor<D>, dtype: DType) -> Tensor<D> {
    if tensor.dtype() == dtype { tensor } else { tensor.cast(dtype) }
}
