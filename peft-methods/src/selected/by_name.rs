//! Biases alone, and parameters whose names an expression matches. PEFT has no file for either: ours holds the tensors
//! under their own names, and the hash of those that they replace.

use super::{Keys, Selected, plan, read_whole};
use crate::registry::{Block, Kind, RunContext, Scaffold};
use burn::tensor::Device;
use peft_core::adapter::{
    AdapterError, AdapterFolder, FileFormat, Layout, PREFIX, Parts, Pattern, SavedAdapter, common_config,
    key, matching, require_base, tensors_sha256,
};
use peft_core::checkpoint::{Checkpoint, Headers};
use peft_core::model::{BaseShapes, ModelConfig, ParameterShape};
use peft_core::nearest::did_you_mean;
use peft_core::strict;
use peft_core::train::{Method, MethodPlan};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::path::Path;

/// BitFit as recipes name it.
pub static BITFIT: Kind = Kind {
    name: "bitfit",
    title: "BitFit",
    about: "the model's biases alone",
    parse: |keys| Ok(Box::new(strict::parse::<BitfitBlock>(keys)?)),
    file: Some(&FORMAT),
    in_peft: false,
    scaffolds: &[Scaffold {
        name: "bitfit",
        about: "the model's biases alone; many models have none",
        keys: &[],
        learning_rates: ("1e-3", "1e-2"),
    }],
};

/// Training by name as recipes name it.
pub static TRAIN_ONLY: Kind = Kind {
    name: "train_only",
    title: "partial fine-tuning",
    about: "the parameters that an expression names",
    parse: |keys| Ok(Box::new(strict::parse::<TrainOnlyBlock>(keys)?)),
    file: Some(&FORMAT),
    in_peft: false,
    scaffolds: &[Scaffold {
        name: "train_only",
        about: "the parameters that an expression names",
        keys: &[(
            "parameters",
            "'.*\\.(v_proj|o_proj)\\.weight'",
            "regular expression over whole parameter names",
        )],
        learning_rates: ("2e-5", "1e-3"),
    }],
};

static FORMAT: FileFormat =
    FileFormat { peft_type: "TRAIN_ONLY", open: |dir| Ok(Box::new(Tensors::open(dir)?)) };

/// The block of BitFit, which has no keys.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct BitfitBlock {}

/// The block of training by name.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct TrainOnlyBlock {
    /// Regular expression over whole parameter names.
    parameters: String,
}

/// The parameters with their keys in the file.
fn keyed(names: impl IntoIterator<Item = String>) -> Keys {
    names.into_iter().map(|name| (name.clone(), key(&name, ""))).collect()
}

impl BitfitBlock {
    fn parameters(&self, model: &ModelConfig) -> Result<Keys, AdapterError> {
        let names = model.parameters().into_iter().map(|p| p.name).filter(|name| name.ends_with(".bias"));
        let keys = keyed(names);
        match keys.is_empty() {
            false => Ok(keys),
            true => Err(AdapterError::Target {
                module: "bitfit".to_string(),
                reason: format!("trains biases, and {} of this shape has none", model.family.architecture()),
            }),
        }
    }
}

impl TrainOnlyBlock {
    fn parameters(&self, model: &ModelConfig) -> Result<Keys, AdapterError> {
        let parameters = model.parameters();
        let names: Vec<&str> = parameters.iter().map(|p| p.name.as_str()).collect();
        let chosen = matching(&Pattern::Regex(self.parameters.clone()), "parameters", &names)?;
        match chosen.is_empty() {
            false => Ok(keyed(chosen)),
            true => Err(AdapterError::Target {
                module: "parameters".to_string(),
                reason: format!(
                    "`{}` matches no whole name of a parameter{}",
                    self.parameters,
                    did_you_mean(&self.parameters, names)
                ),
            }),
        }
    }
}

/// The method that trains the parameters in `keys`.
fn method(name: &'static str, run: &RunContext, keys: Keys) -> peft_core::Result<Box<dyn Method>> {
    let mut config = common_config("TRAIN_ONLY", Some(run.base_name), run.revision);
    let names: Vec<String> = keys.keys().cloned().collect();
    config.insert("base_sha256".to_string(), json!(tensors_sha256(run.base, &names)?));
    let start = run.start.map(Tensors::open).transpose()?;
    let start = start.map(|adapter| Box::new(adapter) as Box<dyn SavedAdapter>);
    Ok(Box::new(Selected { name, keys, config, start }))
}

impl Block for BitfitBlock {
    fn check(&self, _starts_from_adapter: bool) -> Result<(), String> {
        Ok(())
    }

    fn plan(&self, model: &ModelConfig, _base: &Headers) -> peft_core::Result<MethodPlan> {
        Ok(plan(model, &self.parameters(model)?)?)
    }

    fn method(&self, run: &RunContext) -> peft_core::Result<Box<dyn Method>> {
        method(BITFIT.name, run, self.parameters(&run.model()?)?)
    }
}

impl Block for TrainOnlyBlock {
    fn check(&self, _starts_from_adapter: bool) -> Result<(), String> {
        match self.parameters.is_empty() {
            false => Ok(()),
            true => Err("parameters is missing: a regular expression over whole parameter names".to_string()),
        }
    }

    fn plan(&self, model: &ModelConfig, _base: &Headers) -> peft_core::Result<MethodPlan> {
        Ok(plan(model, &self.parameters(model)?)?)
    }

    fn method(&self, run: &RunContext) -> peft_core::Result<Box<dyn Method>> {
        method(TRAIN_ONLY.name, run, self.parameters(&run.model()?)?)
    }
}

/// The keys of the file's configuration.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct TensorsConfig {
    /// Hash of the base's tensors that are replaced.
    base_sha256: String,
}

/// Saved tensors.
struct Tensors {
    folder: AdapterFolder,
    config: TensorsConfig,
}

impl Tensors {
    fn open(dir: &Path) -> Result<Self, AdapterError> {
        let mut folder = AdapterFolder::open(dir)?;
        let config = folder.parse("TRAIN_ONLY", json!({}))?;
        Ok(Self { folder, config })
    }

    /// Names of the parameters in the file.
    fn names(&self) -> Vec<String> {
        self.folder.file.names().map(|key| key.strip_prefix(PREFIX).unwrap_or(key).to_string()).collect()
    }
}

impl SavedAdapter for Tensors {
    fn folder(&self) -> &AdapterFolder {
        &self.folder
    }

    fn parts(&self, base: &BaseShapes, _device: &Device) -> Result<Parts, AdapterError> {
        let mut layout = Layout::default();
        let mut shapes: Vec<ParameterShape> = Vec::new();
        for (path, shape) in &base.weights {
            layout.allow(path, ".weight", shape);
            shapes.push(ParameterShape::new(format!("{path}.weight"), shape.clone()));
            if base.biases.contains(path) {
                layout.allow(path, ".bias", &shape[..1]);
                shapes.push(ParameterShape::new(format!("{path}.bias"), &shape[..1]));
            }
        }
        self.folder.require_keys(&layout)?;
        let held = shapes.into_iter().filter(|p| self.folder.file.contains(&key(&p.name, "")));
        let tensors = held.map(|ParameterShape { name, shape }| (name.clone(), key(&name, ""), shape));
        Ok(Parts { whole: read_whole(&self.folder, tensors)?, ..Parts::default() })
    }

    fn require_base(&self, base: &Checkpoint) -> Result<(), AdapterError> {
        let names = self.names();
        require_base(&self.folder.dir, base, &names, &self.config.base_sha256)
    }
}
