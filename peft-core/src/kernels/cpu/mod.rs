//! The hot operations on the CPU, in f32, as plain functions over slices.
//!
//! Every function overwrites its outputs in full (they may be memory that was used before), runs on rayon's current
//! pool, and gives the same bytes whatever the number of threads: work is cut into tiles that are computed alike
//! wherever they run, and sums over tiles are taken in their order.

pub(crate) mod adamw;
pub(crate) mod attention;
mod backend;
pub(super) mod basis;
pub(crate) mod buffers;
pub(crate) mod bytes;
pub(crate) mod cached;
pub(crate) mod cross_entropy;
pub(crate) mod dropout;
pub(crate) mod gated;
pub(crate) mod largest;
pub(crate) mod linear;
pub(crate) mod matmul;
pub(crate) mod rms_norm;
mod simd;
pub(crate) mod sparse;
mod tile;
mod up;
