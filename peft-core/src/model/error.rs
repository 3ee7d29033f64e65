//! What can be wrong with a model's configuration or weights.

use crate::checkpoint::CheckpointError;
use std::path::PathBuf;

/// Why a checkpoint cannot be loaded as a decoder.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The architecture is none of the supported ones.
    #[error("{path}: unsupported architecture {found}; supported: {supported}")]
    UnsupportedArchitecture {
        /// config.json.
        path: PathBuf,
        /// `architectures` or `model_type` as found.
        found: String,
        /// The supported ones.
        supported: String,
    },
    /// A key of config.json is missing.
    #[error("{path}: key `{key}` is missing")]
    MissingKey {
        /// config.json.
        path: PathBuf,
        /// The key.
        key: String,
    },
    /// A key of config.json has an unusable value.
    #[error("{path}: `{key}` is {found}, expected {expected}")]
    InvalidKey {
        /// config.json.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// A tensor's shape does not follow from config.json.
    #[error("{path}: tensor `{tensor}` has shape {found:?}, config.json asks for {expected:?}")]
    Shape {
        /// The checkpoint's folder.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that the configuration implies.
        expected: Vec<usize>,
    },
    /// A weight is NaN or infinite.
    #[error(
        "{path}: tensor `{tensor}` holds a non-finite value ({value}) at element {index}; the checkpoint is damaged"
    )]
    NonFinite {
        /// The checkpoint's folder.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The value.
        value: f32,
        /// Flat index.
        index: usize,
    },
    /// The checkpoint holds tensors that the architecture has no place for.
    #[error("{path}: tensor `{tensor}` (and {others} more) has no place in architecture {architecture}")]
    UnexpectedTensor {
        /// The checkpoint's folder.
        path: PathBuf,
        /// The first of them.
        tensor: String,
        /// How many more.
        others: usize,
        /// The architecture.
        architecture: &'static str,
    },
    /// Reading the checkpoint failed.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

impl ModelError {
    /// Whether the user's files are wrong (exit code 2).
    pub fn is_bad_input(&self) -> bool {
        match self {
            ModelError::Checkpoint(error) => error.is_bad_input(),
            _ => true,
        }
    }
}
