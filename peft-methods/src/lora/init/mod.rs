//! The first values of a LoRA's factors, one way a file.
//!
//! Each way is a function of a weight `[out, in]`, a rank `r`, a scale `s`, and of the statistics or random numbers it
//! needs, and gives [`InitialFactors`](peft_core::adapter::InitialFactors). PiSSA and OLoRA, which are part of what
//! an adapter file means, stand in [`peft_core::adapter`].

mod attach;
mod corda;
mod error;
mod eva;
mod incremental_pca;
mod lora_ga;
mod orthogonal;
mod pissa_niter;
mod statistics;

pub(super) use attach::{eva, eva_alpha, take_out_of_weights, write_eva};
pub use corda::corda;
pub use error::InitError;
pub use eva::{EvaDirections, eva_directions};
pub use incremental_pca::IncrementalPca;
pub use lora_ga::lora_ga;
pub use orthogonal::orthogonal;
pub use pissa_niter::pissa_niter;
pub use statistics::{Covariances, input_covariances, weight_gradients};
