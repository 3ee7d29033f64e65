//! Why factors cannot be initialised.

use peft_core::linalg::LinalgError;

/// What is wrong with a rank, a statistic or a setting.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum InitError {
    /// A weight or a statistic cannot be decomposed.
    #[error("`{module}`: {init}: {source}")]
    Decomposition {
        /// The module's path.
        module: String,
        /// The initialisation.
        init: &'static str,
        /// What is wrong.
        source: LinalgError,
    },
    /// An orthogonal initialisation of an odd rank.
    #[error("`{module}`: orthogonal splits the rank in two halves, and {rank} is odd")]
    OddRank {
        /// The module's path.
        module: String,
        /// The rank.
        rank: usize,
    },
    /// Inputs that are all zero.
    #[error("`{module}`: {init}: every input of the module is zero on the samples")]
    ZeroInput {
        /// The module's path.
        module: String,
        /// The initialisation.
        init: &'static str,
    },
    /// A gradient that is zero.
    #[error("`{module}`: lora_ga: the gradient of the weight is zero on the samples")]
    ZeroGradient {
        /// The module's path.
        module: String,
    },
    /// EVA asks for more directions than there are inputs.
    #[error(
        "`{module}`: eva: round(rank · rho) = {components} directions are wanted of inputs with {features} features"
    )]
    TooManyComponents {
        /// The module's path.
        module: String,
        /// Directions wanted.
        components: usize,
        /// Features.
        features: usize,
    },
    /// No batch has as many tokens as EVA wants directions.
    #[error(
        "eva: no batch of {batch_size} examples has the {components} tokens that the directions of `{module}` need \
         (the largest has {tokens}); raise micro_batch_size, lower r or eva_config.rho, or set \
         eva_config.use_label_mask: false"
    )]
    TooFewTokens {
        /// The module's path.
        module: String,
        /// Examples a batch.
        batch_size: usize,
        /// Directions wanted.
        components: usize,
        /// Tokens of the largest batch.
        tokens: usize,
    },
}

impl InitError {
    /// Wraps what is wrong with a matrix of the module at `path`.
    pub(super) fn decomposition(path: &str, init: &'static str) -> impl Fn(LinalgError) -> Self {
        let module = path.to_string();
        move |source| InitError::Decomposition { module: module.clone(), init, source }
    }

    /// Whether the user's recipe or files are wrong (exit code 2).
    pub fn is_bad_input(&self) -> bool {
        !matches!(self, InitError::Decomposition { source: LinalgError::NoConvergence { .. }, .. })
    }
}
