//! Training some of the checkpoint's own parameters and nothing else: norms (arXiv 2003.00152, LayerNorm tuning arXiv
//! 2312.11420), biases (BitFit, Ben Zaken et al., arXiv 2106.10199), or whatever an expression names.
//!
//! Everything else is frozen. What trained is held in f32 and written as it is: folding replaces the base's tensors.

mod by_name;
mod norms;

pub use by_name::{BITFIT, TRAIN_ONLY};
pub use norms::NORM_ONLY;

use peft_core::adapter::{
    AdapterError, AdapterFolder, SavedAdapter, parameter_tensor, take_values, weights_bytes, write_adapter,
};
use peft_core::model::{Decoder, ModelConfig};
use peft_core::train::{Method, MethodPlan, PlannedParameter, Preparation, TrainError};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;

/// What is trained: keys in the adapter's file by parameter name.
type Keys = BTreeMap<String, String>;

/// Training of chosen parameters.
struct Selected {
    name: &'static str,
    keys: Keys,
    /// The configuration of the file.
    config: Map<String, Value>,
    start: Option<Box<dyn SavedAdapter>>,
}

impl Method for Selected {
    fn name(&self) -> &'static str {
        self.name
    }

    fn artifact(&self) -> &'static str {
        "adapter"
    }

    fn prepare(&mut self, model: &mut Decoder, _preparation: &Preparation) -> peft_core::Result<()> {
        for parameter in model.parameters_mut() {
            if self.keys.contains_key(&parameter.name) {
                parameter.set_trainable();
            }
        }
        if let Some(start) = &self.start {
            take_values(start.as_ref(), model)?;
        }
        Ok(())
    }

    fn export(&self, model: &Decoder, dir: &Path) -> Result<(), TrainError> {
        let chosen = model.parameters().into_iter().filter_map(|p| Some((self.keys.get(&p.name)?, p)));
        let tensors = chosen.map(|(key, parameter)| parameter_tensor(key.clone(), parameter, dir));
        Ok(write_adapter(dir, self.config.clone(), tensors.collect())?)
    }
}

/// What training the parameters in `keys` would be.
fn plan(model: &ModelConfig, keys: &Keys) -> Result<MethodPlan, AdapterError> {
    let chosen = || model.parameters().into_iter().filter(|p| keys.contains_key(&p.name));
    let tensors = chosen().map(|p| (keys[&p.name].clone(), p.shape));
    Ok(MethodPlan {
        model: model.clone(),
        artifact_bytes: weights_bytes(tensors)?,
        parameters: chosen().map(PlannedParameter::own).collect(),
    })
}

/// Reads the tensors of `layout` of the folder, by parameter name.
fn read_whole(
    folder: &AdapterFolder,
    tensors: impl Iterator<Item = (String, String, Vec<usize>)>,
) -> Result<BTreeMap<String, Vec<f32>>, AdapterError> {
    tensors.map(|(name, key, shape)| Ok((name, folder.read(&key, &shape)?))).collect()
}
