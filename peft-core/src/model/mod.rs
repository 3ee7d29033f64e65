//! Decoder-only transformers. One decoder serves every supported family: they differ by configuration and tensor names
//! only.

mod attention;
mod cache;
mod config;
mod context;
mod decoder;
mod error;
mod generate;
mod layer;
mod load;
mod rope;
mod shapes;

/// The embedding's path in the checkpoints of every family.
pub const EMBEDDING: &str = "model.embed_tokens";
/// The head's.
pub const HEAD: &str = "lm_head";

pub use cache::{Cache, KeyValueCache};
pub use config::{Family, ModelConfig};
pub use context::Context;
pub use decoder::Decoder;
pub use error::ModelError;
pub use generate::{Prompt, Sampling, generate, generate_batches};
pub use layer::Layer;
pub use load::{ComputeType, load, ties_embeddings};
pub use rope::{RopeScaling, RopeTable};
pub use shapes::{BaseShapes, ParameterShape, ProjectionShape};
