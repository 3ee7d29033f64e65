//! The scales of norms alone, in the file of Hugging Face PEFT's LayerNorm tuning.

use super::{Keys, Selected, plan, read_whole};
use crate::registry::{Block, Kind, RunContext, Scaffold, keys_of};
use burn::tensor::Device;
use peft_core::adapter::{
    AdapterError, AdapterFolder, FileFormat, Layout, Parts, Pattern, SavedAdapter, Selection, TargetModules,
    common_config, key, select,
};
use peft_core::checkpoint::Headers;
use peft_core::model::{BaseShapes, ModelConfig};
use peft_core::strict;
use peft_core::train::{Method, MethodPlan};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;

/// Norm tuning as recipes name it.
pub static NORM_ONLY: Kind = Kind {
    name: "norm_only",
    title: "norm-tuning",
    about: "the scales of the norms alone",
    parse: |keys| Ok(Box::new(strict::parse::<NormConfig>(keys)?)),
    file: Some(&FORMAT),
    in_peft: true,
    scaffolds: &[Scaffold {
        name: "norm_only",
        about: "the scales of the norms alone",
        keys: &[("target_modules", "null", "every norm, or a list like [input_layernorm, norm]")],
        learning_rates: ("1e-3", "1e-2"),
    }],
};

static FORMAT: FileFormat =
    FileFormat { peft_type: "LN_TUNING", open: |dir| Ok(Box::new(NormAdapter::open(dir)?)) };

/// The name of a norm's scale, after its path.
const SCALE: &str = ".ln_tuning_layers.weight";

/// PEFT's keys of a LayerNorm tuning.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct NormConfig {
    /// List of names or regular expression; none is every norm.
    target_modules: Option<Pattern>,
    /// Left out.
    exclude_modules: Option<Pattern>,
}

fn neutral_keys() -> Value {
    json!({"modules_to_save": null})
}

impl NormConfig {
    /// With the targets as a list.
    fn spelled_out(&self, base: &BaseShapes) -> Self {
        let all = || {
            let last = |path: &str| path.rsplit('.').next().unwrap_or_default().to_string();
            let names: BTreeSet<String> = norms(base).into_iter().map(last).collect();
            Pattern::Names(names.into_iter().collect())
        };
        let target_modules = Some(self.target_modules.clone().unwrap_or_else(all));
        Self { target_modules, ..self.clone() }
    }

    /// Paths of the chosen norms.
    fn paths(&self, base: &BaseShapes, strict: bool) -> Result<Vec<String>, AdapterError> {
        let targets = self.spelled_out(base).target_modules.map(TargetModules::Matching);
        let selection = Selection {
            targets: targets.as_ref(),
            exclude: self.exclude_modules.as_ref(),
            saved: &[],
            layers: None,
            layers_pattern: &[],
            strict,
        };
        Ok(select(&selection, &norms(base))?.into_iter().map(str::to_string).collect())
    }

    fn keys_by_name(&self, base: &BaseShapes) -> Result<Keys, AdapterError> {
        let paths = self.paths(base, true)?;
        Ok(paths.iter().map(|path| (format!("{path}.weight"), key(path, SCALE))).collect())
    }
}

/// Paths of the norms: the modules whose weight is a vector.
fn norms(base: &BaseShapes) -> Vec<&str> {
    base.weights.iter().filter(|(_, shape)| shape.len() == 1).map(|(path, _)| path.as_str()).collect()
}

impl Block for NormConfig {
    fn check(&self, _starts_from_adapter: bool) -> Result<(), String> {
        Ok(())
    }

    fn plan(&self, model: &ModelConfig, _base: &Headers) -> peft_core::Result<MethodPlan> {
        Ok(plan(model, &self.keys_by_name(&model.base_shapes())?)?)
    }

    fn method(&self, run: &RunContext) -> peft_core::Result<Box<dyn Method>> {
        let base = run.model()?.base_shapes();
        let mut config = common_config("LN_TUNING", Some(run.base_name), run.revision);
        config.extend(keys_of(&self.spelled_out(&base)));
        config.extend(keys_of(&neutral_keys()));
        let start = run.start.map(NormAdapter::open).transpose()?;
        let start = start.map(|adapter| Box::new(adapter) as Box<dyn SavedAdapter>);
        let keys = self.keys_by_name(&base)?;
        Ok(Box::new(Selected { name: NORM_ONLY.name, keys, config, start }))
    }
}

/// A saved norm tuning.
struct NormAdapter {
    folder: AdapterFolder,
    config: NormConfig,
}

impl NormAdapter {
    fn open(dir: &Path) -> Result<Self, AdapterError> {
        let mut folder = AdapterFolder::open(dir)?;
        let config = folder.parse("LN_TUNING", neutral_keys())?;
        Ok(Self { folder, config })
    }
}

impl SavedAdapter for NormAdapter {
    fn folder(&self) -> &AdapterFolder {
        &self.folder
    }

    fn parts(&self, base: &BaseShapes, _device: &Device) -> Result<Parts, AdapterError> {
        let paths = self.config.paths(base, false)?;
        let mut layout = Layout::default();
        paths.iter().for_each(|path| layout.require(path, SCALE, &base.weights[path]));
        self.folder.require_keys(&layout)?;
        let tensors =
            paths.iter().map(|path| (format!("{path}.weight"), key(path, SCALE), base.weights[path].clone()));
        Ok(Parts { whole: read_whole(&self.folder, tensors)?, ..Parts::default() })
    }
}
