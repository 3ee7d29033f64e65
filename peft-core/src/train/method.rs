//! What a fine-tuning method is to the training loop.

use super::error::TrainError;
use crate::model::Decoder;
use std::path::Path;

/// A way to adapt a model: it chooses what trains, and writes the result.
pub trait Method {
    /// The method's name in recipes.
    fn name(&self) -> &'static str;

    /// The subfolder of the run's output that holds the result, `adapter` or `model`.
    fn artifact(&self) -> &'static str;

    /// Attaches the method's parameters to the model and marks what trains. Initial values derive from `seed`.
    fn prepare(&self, model: &mut Decoder, seed: u64) -> crate::Result<()>;

    /// Writes the trained result as files into the existing folder `dir`.
    fn export(&self, model: &Decoder, dir: &Path) -> Result<(), TrainError>;
}
