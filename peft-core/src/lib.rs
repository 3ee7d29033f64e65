//! Pretrained transformers on burn, and what every fine-tuning method stands on: checkpoints, text, data, the hot
//! operations, projections with a change on top, the decoder, the adapter file format and the training step.
//!
//! The parts build on each other from the ground up: [`checkpoint`] and [`text`], then [`data`], [`kernels`],
//! [`projection`], [`model`], [`adapter`], [`train`]. Each may use what stands before it and nothing after it.

pub mod adapter;
pub mod checkpoint;
mod contain;
pub mod data;
mod error;
pub mod kernels;
pub mod linalg;
pub mod model;
pub mod nearest;
pub mod projection;
pub mod random;
pub mod strict;
pub mod text;
pub mod train;

pub use error::{Error, Result};
