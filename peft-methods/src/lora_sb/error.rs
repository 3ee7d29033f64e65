//! Why the factors of `s·B·R·A` cannot be initialised.

use peft_core::linalg::LinalgError;
use peft_core::train::TrainError;

/// What is wrong with a rank, a weight or a gradient.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CoreInitError {
    /// The weight, or the first step made of its gradient, cannot be decomposed.
    #[error("`{module}`: {source}")]
    Decomposition {
        /// The module's path.
        module: String,
        /// What is wrong.
        source: LinalgError,
    },
    /// A gradient that is zero.
    #[error(
        "`{module}`: lora_sb: the gradient of the weight is zero on the {samples} samples; leave the module out \
         (exclude_modules), or use lora_xs, which looks at no gradient"
    )]
    ZeroGradient {
        /// The module's path.
        module: String,
        /// Examples that it was taken on.
        samples: usize,
    },
    /// A gradient that is no number.
    #[error(
        "`{module}`: lora_sb: the gradient of the weight is not finite on the {samples} samples; the base or the data is damaged, or dtype is too narrow"
    )]
    NonFiniteGradient {
        /// The module's path.
        module: String,
        /// Examples that it was taken on.
        samples: usize,
    },
}

impl From<CoreInitError> for TrainError {
    fn from(error: CoreInitError) -> Self {
        TrainError::Preparation(error.to_string())
    }
}
