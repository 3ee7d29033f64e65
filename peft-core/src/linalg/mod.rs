//! Dense linear algebra on host memory.
//!
//! Decompositions are computed in f64 and by one thread, so that a result depends on nothing but the machine and the
//! input; callers run several matrices side by side. Values enter and leave as row-major f32 ([`Matrix::from_rows`],
//! [`Matrix::to_rows`]), and finiteness is checked where they enter.

mod balanced;
mod eigen;
mod error;
mod inverse;
mod matrix;
mod qr;
mod randomized_svd;
mod svd;
mod top_k;
mod top_svd;

pub use balanced::balanced;
pub use eigen::{SymmetricEigen, symmetric_eigen};
pub use error::LinalgError;
pub use inverse::spd_inverse;
pub use matrix::Matrix;
pub use qr::{Qr, qr};
pub use randomized_svd::{Sketch, randomized_svd};
pub use svd::{Svd, svd};
pub use top_k::{NotFinite, magnitude, top_k};
pub use top_svd::top_svd;

#[cfg(test)]
mod fixtures;
