//! What can be wrong with an adapter or its targets.

use crate::checkpoint::{CheckpointError, Dtype};
use crate::linalg::LinalgError;
use crate::model::ModelError;
use std::path::PathBuf;

/// Why an adapter cannot be read, attached, folded or written.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// adapter_config.json cannot be understood.
    #[error("{path}: {message}")]
    Config {
        /// adapter_config.json.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// The configuration asks for something that changes the forward in a way this program does not know.
    #[error("{path}: `{key}` is {value}, which is not supported")]
    Unsupported {
        /// adapter_config.json.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value.
        value: String,
    },
    /// The adapter belongs to a base that its initialisation changed and that cannot be computed again.
    #[error(
        "{path}: init_lora_weights is {value}: the adapter belongs to a base that was changed at the start of its \
         training, and {reason}; convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)"
    )]
    ChangedBase {
        /// adapter_config.json.
        path: PathBuf,
        /// The initialisation.
        value: String,
        /// Why the base is lost.
        reason: &'static str,
    },
    /// A weight cannot be decomposed as an initialisation asks.
    #[error("`{module}`: {source}")]
    Decomposition {
        /// The module's path.
        module: String,
        /// What is wrong.
        source: LinalgError,
    },
    /// A target matches no module.
    #[error("target_modules: {pattern} matches no module of the model{suggestion}; modules: {available}")]
    NoMatch {
        /// The name or expression.
        pattern: String,
        /// "(did you mean …?)" or nothing.
        suggestion: String,
        /// Last names of the linear modules.
        available: String,
    },
    /// A regular expression does not parse.
    #[error("{key}: `{pattern}` is not a valid regular expression: {message}")]
    Pattern {
        /// The key it stands under.
        key: &'static str,
        /// The expression.
        pattern: String,
        /// The engine's complaint.
        message: String,
    },
    /// `modules_to_save` names a module that cannot be trained whole.
    #[error("modules_to_save: `{name}` {reason}")]
    ModulesToSave {
        /// The name.
        name: String,
        /// Why it cannot.
        reason: String,
    },
    /// A module cannot be changed as asked.
    #[error("{module}: {reason}")]
    Target {
        /// The module or key.
        module: String,
        /// Why not.
        reason: String,
    },
    /// One end of a weight that embedding and head share is to change, and nothing says what becomes of the other.
    #[error(
        "`{module}` shares its weight with the other end of the model (tie_word_embeddings); set ensure_weight_tying: true to train one weight for both ends, or false to give each end its own (the folded checkpoint is then larger by an embedding)"
    )]
    SharedWeight {
        /// The module named.
        module: String,
    },
    /// The adapter lacks tensors that its configuration implies.
    #[error("{path}: tensor `{key}` is missing{suggestion}{others}")]
    MissingKey {
        /// The adapter file.
        path: PathBuf,
        /// The first missing key.
        key: String,
        /// "(did you mean …?)" or nothing.
        suggestion: String,
        /// " (and n more)" or nothing.
        others: String,
    },
    /// The adapter holds tensors that have no place.
    #[error("{path}: tensor `{key}` has no place in the model{suggestion}{others}")]
    UnexpectedKey {
        /// The adapter file.
        path: PathBuf,
        /// The first such key.
        key: String,
        /// "(did you mean …?)" or nothing.
        suggestion: String,
        /// " (and n more)" or nothing.
        others: String,
    },
    /// A tensor has the wrong shape.
    #[error("{path}: tensor `{key}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// The adapter file.
        path: PathBuf,
        /// The tensor.
        key: String,
        /// Its shape.
        found: Vec<usize>,
        /// What configuration and base imply.
        expected: Vec<usize>,
    },
    /// A tensor or a folded weight is not finite.
    #[error("{path}: tensor `{key}` holds a non-finite value")]
    NonFinite {
        /// The adapter file, or the base.
        path: PathBuf,
        /// The tensor.
        key: String,
    },
    /// A new value does not fit the type it is to be stored in.
    #[error("the new values of tensor `{key}` are not finite in {dtype}; choose a wider --dtype")]
    NonFiniteResult {
        /// The tensor.
        key: String,
        /// The type.
        dtype: Dtype,
    },
    /// The folded checkpoint does not do what the adapter does.
    #[error(
        "the folded checkpoint does not do what the adapter does: its logits differ by {mean:.1e} of their spread on \
         average, where the adapter itself makes {effect:.1e}; {reason} (--dtype f32 rounds least, --force keeps the \
         result all the same)"
    )]
    Drift {
        /// Mean difference over spread.
        mean: f64,
        /// Mean difference that the adapter makes, over spread.
        effect: f64,
        /// What is too much about it.
        reason: String,
    },
    /// The record of a fold cannot be understood.
    #[error("{path}: not the record of a merge: {message}")]
    Record {
        /// merge.json.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// Unfolding with an adapter that was not folded.
    #[error("{adapter}: not the adapter that was folded into {merged}")]
    OtherAdapter {
        /// The adapter's weights.
        adapter: PathBuf,
        /// The folded checkpoint.
        merged: PathBuf,
    },
    /// Unfolding with a base that was not folded into.
    #[error("{base}: not the base of {merged}: tensor `{tensor}` is another")]
    OtherBase {
        /// The base.
        base: PathBuf,
        /// The folded checkpoint.
        merged: PathBuf,
        /// The first tensor that differs.
        tensor: String,
    },
    /// The adapter was made on other weights.
    #[error(
        "{adapter}: made for another base: the weights that it changes have the hash {expected}, those of {base} {found}"
    )]
    WrongBase {
        /// The adapter's folder.
        adapter: PathBuf,
        /// The base at hand.
        base: PathBuf,
        /// The hash in the adapter's configuration.
        expected: String,
        /// That of the base.
        found: String,
    },
    /// A tensor was changed in a way that subtraction does not undo, and its original is nowhere.
    #[error(
        "tensor `{tensor}` was replaced or rescaled, so nothing here tells what it was; give --base-model, or merge with \
         --keep-original"
    )]
    Unrestorable {
        /// The tensor.
        tensor: String,
    },
    /// Reading or writing failed.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The base is no model that is supported.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl AdapterError {
    /// Whether the user's files or recipe are wrong (exit code 2).
    pub fn is_bad_input(&self) -> bool {
        match self {
            AdapterError::Checkpoint(error) => error.is_bad_input(),
            AdapterError::Model(error) => error.is_bad_input(),
            AdapterError::Drift { .. } => false,
            _ => true,
        }
    }
}
