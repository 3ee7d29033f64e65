//! The kernels on NVIDIA GPUs: CUDA C compiled by NVRTC when first used, matrix products by cuBLASLt, both enqueued beside
//! cubecl's own work.

mod attention;
mod backend;
mod basis;
mod cublaslt;
mod engine;
mod error;
mod linear;
mod optimizer;
mod sparse;

use super::backend::Kernels;
pub(super) use basis::{combinations, combinations_backward};
use burn::backend::Cube;
use burn::tensor::{Device, Tensor};
pub(super) use engine::is_available;

/// Bytes of a CUDA device's memory that nobody uses, and all of them.
pub(super) fn memory(device: &Device) -> Option<(u64, u64)> {
    engine::memory(&Cube::primitive(Tensor::<1>::zeros([1], device)).client)
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
