//! Full-parameter training: every weight of the model trains, and the result is a checkpoint.

use peft_core::adapter::{Rewrite, RewriteOptions, rewrite_into};
use peft_core::checkpoint::Checkpoint;
use peft_core::model::Decoder;
use peft_core::train::{Method, Preparation, TrainError};
use std::path::Path;

/// Trains all of the checkpoint's weights.
pub struct Full {
    /// The base: tensors keep its types and its files are carried over.
    pub base: Checkpoint,
}

impl Method for Full {
    fn name(&self) -> &'static str {
        "full"
    }

    fn artifact(&self) -> &'static str {
        "model"
    }

    fn prepare(&self, model: &mut Decoder, _preparation: &Preparation) -> peft_core::Result<()> {
        for parameter in model.parameters_mut() {
            parameter.set_trainable();
        }
        Ok(())
    }

    fn export(&self, model: &Decoder, dir: &Path) -> Result<(), TrainError> {
        let mut rewrite = Rewrite::default();
        for parameter in model.parameters() {
            rewrite.changes.insert(parameter.name.clone(), Box::new(|_| parameter.to_host()));
        }
        let options = RewriteOptions { dtype: None, max_shard_size: RewriteOptions::DEFAULT_SHARD };
        rewrite_into(&self.base, dir, &options, &rewrite)?;
        Ok(())
    }
}
