//! The kernels on NVIDIA GPUs: CUDA C compiled by NVRTC when first used, matrix products by cuBLASLt, both enqueued beside
//! cubecl's own work.

mod addresses;
mod attention;
mod backend;
mod basis;
mod commands;
mod cublaslt;
mod engine;
mod error;
mod factors;
mod linear;
mod optimizer;
mod pooled;
mod queue;
mod sparse;

use super::backend::Kernels;
use crate::linalg::NotFinite;
pub(super) use basis::{combinations, combinations_backward};
use burn::backend::Cube;
use burn::tensor::{Device, Shape, Tensor};
use burn_cubecl::tensor::CubeTensor;
pub(super) use engine::is_available;
pub(super) use optimizer::aged_adamw;
pub(super) use pooled::trim;

/// Bytes of a CUDA device's memory that nobody uses, and all of them.
pub(super) fn memory(device: &Device) -> Option<(u64, u64)> {
    engine::memory(&Cube::primitive(Tensor::<1>::zeros([1], device)).client)
}

/// A copy of `tensor` with its rows one after another, in memory of its own.
pub(super) fn settled<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    let tensor = backend::contiguous(&Cube::primitive(tensor));
    let (client, device) = (tensor.client.clone(), tensor.device.clone());
    let bytes = tensor.meta.num_elements() * tensor.dtype.size();
    let handle = client.memory_persistent_allocation((), |()| client.empty(bytes));
    let shape = Shape::from(tensor.meta.shape().to_vec());
    let copy = CubeTensor::new_contiguous(client.clone(), device, shape, handle, tensor.dtype);
    engine::submit("settled", &client, [&tensor, &copy], move |queue, at| queue.copy(at[0], at[1], bytes));
    Cube::tensor(copy)
}

/// The `count` entries of largest magnitude of `dyᵀ·x`, one at least: their places in order, and the entries, `[1, count]`.
pub(super) fn largest_products(
    x: Tensor<2>,
    dy: Tensor<2>,
    count: usize,
) -> Result<(Vec<u32>, Tensor<2>), NotFinite> {
    let (found, values) = sparse::largest_products(&Cube::primitive(dy), &Cube::primitive(x), count);
    let mut found = Cube::read_later(found)().into_iter();
    match found.next() {
        // −1: none that is not finite.
        None | Some(u32::MAX) => Ok((found.collect(), Cube::tensor(values))),
        Some(index) => Err(NotFinite { index: index as usize }),
    }
}

/// Where a CUDA device's time went since the last call, if `PEFT_PROFILE` is in the environment: for each kind of work its
/// name, how often it ran, milliseconds of the device and milliseconds that enqueueing it took.
pub fn profile(device: &Device) -> Vec<(&'static str, usize, f64, f64)> {
    engine::profile(&Cube::primitive(Tensor::<1>::zeros([1], device)).client)
}

/// What went wrong on a GPU since the program started, if anything did. Work is enqueued without waiting for it, so it
/// shows some time after.
pub fn fault() -> Option<String> {
    error::first().map(|fault| fault.0)
}
