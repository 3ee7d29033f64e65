//! The program's error and its exit code.

use peft_core::train::TrainError;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// What ends a command.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// A flag's value makes no sense.
    #[error("{flag}: {message}")]
    Flag {
        /// The flag.
        flag: String,
        /// What is wrong.
        message: String,
    },
    /// The recipe cannot be understood.
    #[error("{path}: {message}")]
    Recipe {
        /// The recipe's file.
        path: PathBuf,
        /// What is wrong, naming the key.
        message: String,
    },
    /// The path is nothing that can be inspected.
    #[error("{path}: {message}")]
    Inspect {
        /// What was given.
        path: String,
        /// What is wrong.
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
    /// The output folder is in use.
    #[error("{path}: another process trains into this folder; wait for it, or choose another output_dir")]
    Busy {
        /// The folder.
        path: PathBuf,
    },
    /// The run would need more memory than there is, and was asked to stop then.
    #[error("{0} (--require-fit)")]
    DoesNotFit(String),
    /// The device is not there.
    #[error("device `{device}`: {message}")]
    Device {
        /// As asked for.
        device: String,
        /// Why not.
        message: String,
    },
    /// The device did not do what it was asked.
    #[error("the device failed: {0}")]
    DeviceFailed(String),
    /// Anything the toolkit reports.
    #[error(transparent)]
    Core(#[from] peft_core::Error),
}

/// The exit code where a device failed: the same run may well come to its end when begun again.
pub const DEVICE_FAILED: u8 = 3;

impl CliError {
    /// 2 for bad input, [`DEVICE_FAILED`], 1 for anything else.
    pub fn exit_code(&self) -> u8 {
        use peft_core::Error::Train;
        if matches!(self, CliError::DeviceFailed(_) | CliError::Core(Train(TrainError::Device { .. }))) {
            return DEVICE_FAILED;
        }
        let bad_input = match self {
            // A path that cannot be is a mistake; a disk that fails is not.
            CliError::Io { source, .. } => matches!(
                source.kind(),
                ErrorKind::NotADirectory
                    | ErrorKind::PermissionDenied
                    | ErrorKind::InvalidInput
                    | ErrorKind::InvalidFilename
            ),
            CliError::Busy { .. } => false,
            CliError::Core(error) => error.is_bad_input(),
            _ => true,
        };
        if bad_input { 2 } else { 1 }
    }

    /// What is wrong with the method of the recipe at `path`.
    pub fn method(path: &Path, message: &str) -> Self {
        CliError::Recipe { path: path.to_path_buf(), message: format!("`method`: {message}") }
    }

    /// A flag's error.
    pub fn flag(flag: &str, message: impl ToString) -> Self {
        CliError::Flag { flag: flag.to_string(), message: message.to_string() }
    }
}

/// Lets `?` take the parts' errors directly.
macro_rules! from_core {
    ($($part:path),*) => {
        $(impl From<$part> for CliError {
            fn from(error: $part) -> Self {
                CliError::Core(error.into())
            }
        })*
    };
}

from_core!(
    peft_core::checkpoint::CheckpointError,
    peft_core::text::TextError,
    peft_core::data::DataError,
    peft_core::model::ModelError,
    peft_core::adapter::AdapterError,
    peft_core::train::TrainError
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_failed_has_a_code_of_its_own() {
        let device = TrainError::Device { step: 7, message: "CUDA: 719".to_string() };
        assert_eq!(CliError::from(device).exit_code(), 3);
        assert_eq!(CliError::DeviceFailed("CUDA: 719".to_string()).exit_code(), 3);
        assert_eq!(CliError::flag("--jobs", "0").exit_code(), 2);
        assert_eq!(CliError::Busy { path: PathBuf::from("out") }.exit_code(), 1);
    }
}
