//! One error for the whole crate, made of each part's catalogue.

use crate::adapter::AdapterError;
use crate::checkpoint::CheckpointError;
use crate::data::DataError;
use crate::model::ModelError;
use crate::text::TextError;
use crate::train::TrainError;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading or writing a checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Tokenizer or chat template.
    #[error(transparent)]
    Text(#[from] TextError),
    /// Records and examples.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Configuration or weights of a model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Adapter files and targets.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// The training run.
    #[error(transparent)]
    Train(#[from] TrainError),
}

/// A result with the crate's error.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Whether the user's input is wrong (exit code 2), as against anything else (exit code 1).
    pub fn is_bad_input(&self) -> bool {
        match self {
            Error::Checkpoint(error) => error.is_bad_input(),
            Error::Text(error) => error.is_bad_input(),
            Error::Data(error) => error.is_bad_input(),
            Error::Model(error) => error.is_bad_input(),
            Error::Adapter(error) => error.is_bad_input(),
            Error::Train(error) => error.is_bad_input(),
        }
    }
}
