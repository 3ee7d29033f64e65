//! What is there of a run from earlier, and whether it is the run that is wanted now.

use super::plan::Wanted;
use crate::commands::train::identity::{self, Inputs};
use crate::commands::train::{self, Examples, datasets, device_kind, train_config, unix_seconds};
use crate::device;
use crate::error::CliError;
use crate::open::{self, Base};
use crate::recipe::{Checkpointing, Recipe};
use peft_core::data::{Dataset, DatasetType};
use peft_core::model::ModelConfig;
use peft_core::train::{Identity, latest_checkpoint, saved_identity};
use serde_json::{Value, json};

/// What is there of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// All of it.
    Finished,
    /// A beginning, or nothing: `peft train --resume auto` goes on or starts.
    Open,
    /// Results of another run, which make room.
    Another,
}

/// What every run of a comparison works on, as it is now.
pub struct Material {
    base: Base,
    base_sha256: String,
    /// Data read with this time for chat templates that write the date.
    data: (u64, Dataset, Option<Dataset>),
}

impl Material {
    /// Opens base and data, which all runs have in common.
    ///
    /// # Errors
    /// What would end every single run: no such base, unusable data.
    pub fn open(recipe: &Recipe, offline: bool) -> Result<Self, CliError> {
        let base = open::base(&recipe.base_model, &open::hub(recipe.revision.as_deref(), offline))?;
        ModelConfig::from_json(base.checkpoint.dir(), base.checkpoint.config())?;
        let device = device::device(&recipe.device)?;
        device::compute_type(&recipe.dtype, &device)?;
        let now = unix_seconds();
        let (dataset, held_out) = datasets(recipe, &base.tokenizer, now)?;
        let base_sha256 = base.checkpoint.sha256();
        Ok(Self { base, base_sha256, data: (now, dataset, held_out) })
    }

    /// What is there of the run.
    ///
    /// # Errors
    /// Data that can no longer be read.
    pub fn standing(&mut self, wanted: &Wanted) -> Result<Standing, CliError> {
        let dir = wanted.dir();
        let bytes = std::fs::read(dir.join("run.json")).unwrap_or_default();
        let Ok(info) = serde_json::from_slice::<Value>(&bytes) else { return Ok(Standing::Open) };
        if !same_recipe(&info["recipe"], &wanted.recipe) {
            return Ok(Standing::Another);
        }
        // Without a state nothing was done that could be of another run.
        let Some(checkpoint) = latest_checkpoint(&dir) else { return Ok(Standing::Open) };
        let Ok(saved) = saved_identity(&checkpoint) else { return Ok(Standing::Another) };
        let started_at = info["started_at"].as_u64().unwrap_or(self.data.0);
        let now = self.identity(&wanted.recipe, started_at, &saved)?;
        if saved.run != now.run || saved.environment != now.environment {
            return Ok(Standing::Another);
        }
        Ok(if info["result"].is_object() { Standing::Finished } else { Standing::Open })
    }

    /// The identity that the run would have if it were started now, with what `saved` chose where the recipe leaves it
    /// open.
    fn identity(&mut self, recipe: &Recipe, started_at: u64, saved: &Identity) -> Result<Identity, CliError> {
        let all = recipe.datasets.iter().chain(&recipe.eval_datasets);
        if self.data.0 != started_at && all.into_iter().any(|data| data.format == DatasetType::Messages) {
            let (dataset, held_out) = datasets(recipe, &self.base.tokenizer, started_at)?;
            self.data = (started_at, dataset, held_out);
        }
        let (_, dataset, held_out) = &self.data;
        let Examples { train, validation, eval_files } = train::examples(recipe, dataset, held_out.clone())?;
        let mut recipe = recipe.clone();
        if recipe.gradient_checkpointing == Checkpointing::Auto {
            recipe.gradient_checkpointing = identity::checkpointing(saved);
        }
        let device = device::device(&recipe.device)?;
        let dtype = format!("{:?}", device::compute_type(&recipe.dtype, &device)?);
        let config = train_config(&recipe, recipe.output_dir.as_ref());
        let inputs = Inputs {
            base_sha256: &self.base_sha256,
            files: &dataset.files,
            eval_files: &eval_files,
            train: &train,
            validation: &validation,
            device: device_kind(&device),
            dtype: &dtype,
            total_steps: config.total_steps(&config.epochs(&train)),
        };
        Ok(identity::identity(&recipe, config.warmup, &inputs))
    }
}

/// Whether the recipe that a run wrote down is this one: every key counts, those too that a resume may change, but
/// where it lies and what was left to be chosen.
fn same_recipe(written: &Value, wanted: &Recipe) -> bool {
    let (mut written, mut wanted) = (written.clone(), json!(wanted));
    let chosen = wanted["gradient_checkpointing"] == "auto";
    for recipe in [&mut written, &mut wanted] {
        let Some(keys) = recipe.as_object_mut() else { return false };
        keys.remove("output_dir");
        if chosen {
            keys.remove("gradient_checkpointing");
        }
    }
    written == wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_is_known_again_by_every_key_that_tells() {
        let wanted = Recipe::default();
        let mut written = json!(wanted);
        (written["output_dir"], written["gradient_checkpointing"]) = ("moved".into(), false.into());
        assert!(same_recipe(&written, &wanted));
        let fixed = Recipe { eval_generations: 3, ..wanted.clone() };
        assert!(!same_recipe(&written, &fixed));
        let asked = Recipe {
            gradient_checkpointing: Checkpointing::Mode(peft_core::train::GradientCheckpointing::Layers),
            ..wanted.clone()
        };
        assert!(!same_recipe(&written, &asked));
        assert!(!same_recipe(&Value::Null, &wanted));
    }
}
