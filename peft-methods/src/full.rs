//! Full-parameter training: every weight of the model trains, and the result is a checkpoint.

use crate::registry::{Block, Kind, RunContext, Scaffold};
use peft_core::adapter::{Rewrite, RewriteOptions, rewrite_into};
use peft_core::checkpoint::{Checkpoint, CheckpointError, Headers, LazyTensor, safetensors_bytes};
use peft_core::model::{Decoder, ModelConfig};
use peft_core::train::{Method, MethodPlan, PlannedParameter, Preparation, TrainError};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;

/// Full-parameter training as recipes name it.
pub static FULL: Kind = Kind {
    name: "full",
    title: "full-parameter training",
    about: "every weight",
    parse: |keys| match keys.as_object().and_then(|keys| keys.keys().next()) {
        None => Ok(Box::new(FullBlock)),
        Some(key) => Err(format!("method full has no key `{key}`")),
    },
    file: None,
    in_peft: false,
    scaffolds: &[Scaffold {
        name: "full",
        about: "every weight",
        keys: &[],
        learning_rates: ("2e-5", "1e-3"),
    }],
};

/// The block of a recipe, which has no keys.
#[derive(Debug, Clone, Serialize)]
struct FullBlock;

impl Block for FullBlock {
    fn check(&self, starts_from_adapter: bool) -> Result<(), String> {
        match starts_from_adapter {
            true => Err("full has no adapter to start from; remove adapter_name_or_path".to_string()),
            false => Ok(()),
        }
    }

    fn plan(&self, model: &ModelConfig, base: &Headers) -> peft_core::Result<MethodPlan> {
        Ok(Full::plan(model, base)?)
    }

    fn method(&self, run: &RunContext) -> peft_core::Result<Box<dyn Method>> {
        Ok(Box::new(Full { base: Checkpoint::open(run.base.dir())? }))
    }
}

/// Trains all of the checkpoint's weights.
pub struct Full {
    /// The base: tensors keep its types and its files are carried over.
    pub base: Checkpoint,
}

impl Full {
    /// What [`prepare`](Method::prepare) would make trainable: everything. The result has the base's tensors in their
    /// types.
    ///
    /// # Errors
    /// Sizes beyond all bounds.
    pub fn plan(model: &ModelConfig, base: &Headers) -> Result<MethodPlan, CheckpointError> {
        let tensors = base.tensors().iter();
        let tensors =
            tensors.map(|(name, t)| LazyTensor::shape_only(name, t.dtype, t.shape.clone())).collect();
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        Ok(MethodPlan {
            model: model.clone(),
            parameters: model.parameters().into_iter().map(PlannedParameter::own).collect(),
            artifact_bytes: safetensors_bytes(base.dir(), tensors, &metadata)?,
        })
    }
}

impl Method for Full {
    fn name(&self) -> &'static str {
        "full"
    }

    fn artifact(&self) -> &'static str {
        "model"
    }

    fn prepare(&mut self, model: &mut Decoder, _preparation: &Preparation) -> peft_core::Result<()> {
        for parameter in model.parameters_mut() {
            parameter.set_trainable();
        }
        Ok(())
    }

    fn export(&self, model: &Decoder, dir: &Path) -> Result<(), TrainError> {
        let mut rewrite = Rewrite::default();
        for parameter in model.parameters() {
            rewrite.changes.insert(parameter.name.clone(), Box::new(|_| Ok(parameter.to_host())));
        }
        let options = RewriteOptions { dtype: None, max_shard_size: RewriteOptions::DEFAULT_SHARD };
        rewrite_into(&self.base, dir, &options, &rewrite)?;
        Ok(())
    }
}
