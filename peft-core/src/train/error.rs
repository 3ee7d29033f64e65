//! What can end a training run.

use crate::adapter::AdapterError;
use crate::checkpoint::CheckpointError;
use std::path::PathBuf;

/// Why training cannot start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// No parameter trains.
    #[error("nothing to train: the method selected no parameter")]
    NothingToTrain,
    /// The device did not do what it was asked.
    #[error("step {step}: {message}; stopped, earlier checkpoints stand as they are")]
    Device {
        /// The step.
        step: u64,
        /// What it said.
        message: String,
    },
    /// The loss or the gradient is not finite.
    #[error("step {step}: {what} is {value}; stopped, {saved}")]
    NonFinite {
        /// The step.
        step: u64,
        /// Loss or gradient norm.
        what: &'static str,
        /// Its value.
        value: f64,
        /// What is on disk.
        saved: String,
    },
    /// A trained value is not finite: it is not saved.
    #[error(
        "`{name}` holds a value that is not finite after step {step}; not saved, earlier checkpoints stand as they are"
    )]
    NonFiniteParameter {
        /// The parameter.
        name: String,
        /// The step.
        step: u64,
    },
    /// A token id lies outside the embedding.
    #[error(
        "{source_name}: token id {id} is outside the model's vocabulary of {vocab_size}; the tokenizer belongs to another model"
    )]
    Vocabulary {
        /// Which data.
        source_name: &'static str,
        /// The id.
        id: i64,
        /// Rows of the embedding.
        vocab_size: usize,
    },
    /// The method cannot give its parameters their first values.
    #[error("method: {0}")]
    Preparation(String),
    /// The method cannot go on.
    #[error("{0}")]
    Method(String),
    /// A saved state does not belong to this run.
    #[error("{path}: {message}")]
    State {
        /// The state's file.
        path: PathBuf,
        /// What does not fit.
        message: String,
    },
    /// A file of the run cannot be written or read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// Saving or loading weights failed.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Saving the adapter failed.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
}

impl TrainError {
    /// Whether the user's files or recipe are wrong (exit code 2).
    pub fn is_bad_input(&self) -> bool {
        match self {
            TrainError::Device { .. }
            | TrainError::NonFinite { .. }
            | TrainError::NonFiniteParameter { .. }
            | TrainError::Io { .. } => false,
            TrainError::Checkpoint(error) => error.is_bad_input(),
            TrainError::Adapter(error) => error.is_bad_input(),
            _ => true,
        }
    }
}
