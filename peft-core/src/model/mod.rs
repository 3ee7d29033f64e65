//! Decoder-only transformers. One decoder serves every supported family: they differ by configuration and tensor names
//! only.

mod attention;
mod cache;
mod config;
mod decoder;
mod error;
mod generate;
mod layer;
mod load;
mod rope;

pub use cache::KeyValueCache;
pub use config::{Family, ModelConfig};
pub use decoder::{Context, Decoder};
pub use error::ModelError;
pub use generate::{Sampling, generate};
pub use layer::Layer;
pub use load::{ComputeType, load};
pub use rope::{RopeScaling, RopeTable};
