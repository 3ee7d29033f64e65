//! The method blocks of a recipe, and what both have in common.

use peft_core::adapter::{AdapterError, Layers, Names, Pattern, Selection, TargetModules, select_linear};
use peft_core::linalg::Sketch;
use peft_core::model::BaseShapes;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// Ranks above this are no adapter.
const MAX_RANK: usize = 1 << 16;

/// Which modules change.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Targets {
    /// List of names, regular expression, or `all-linear`; none is q and v.
    pub target_modules: Option<TargetModules>,
    /// Left out.
    pub exclude_modules: Option<Pattern>,
    /// Only these layers, where targets are a list of names.
    pub layers_to_transform: Option<Layers>,
    /// Name of the list that layers are numbered in; any by default.
    pub layers_pattern: Option<Names>,
}

/// What a file of changes `s·B·R·A` says about them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CoreConfig {
    /// Rank.
    pub r: usize,
    /// `s`.
    pub scale: f64,
    /// Dropout of the low-rank path's input in training.
    #[serde(default)]
    pub lora_dropout: f64,
    /// Where they attach.
    #[serde(flatten)]
    pub targets: Targets,
    /// Where the factors came from; null where that is not said.
    #[serde(default)]
    pub init: Value,
}

impl CoreConfig {
    /// Checks that values are in range and go together.
    ///
    /// # Errors
    /// A message about the first that does not.
    pub fn check(&self) -> Result<(), String> {
        if !(1..=MAX_RANK).contains(&self.r) {
            return Err(format!("r is {}, expected a rank from 1 to {MAX_RANK}", self.r));
        }
        if !(self.scale.is_finite() && self.scale > 0.0) {
            return Err(format!("scale is {}, expected a positive number", self.scale));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(format!("lora_dropout is {}, expected a probability below 1", self.lora_dropout));
        }
        let Targets { target_modules, layers_to_transform, layers_pattern, .. } = &self.targets;
        let by_name = matches!(target_modules, Some(TargetModules::Matching(Pattern::Names(_))) | None);
        if layers_to_transform.is_some() && !by_name {
            return Err("layers_to_transform needs target_modules to be a list of names".to_string());
        }
        if layers_pattern.is_some() && layers_to_transform.is_none() {
            return Err("layers_pattern needs layers_to_transform beside it".to_string());
        }
        Ok(())
    }

    /// The modules of a base that change, with `[out, in]`. With `strict` (a recipe's configuration, not a file's) every
    /// name must match something.
    ///
    /// # Errors
    /// A name, layer or expression that matches nothing; an end of the model that is no linear module of its own; a rank
    /// above a weight's dimensions.
    pub fn place(
        &self,
        base: &BaseShapes,
        strict: bool,
    ) -> Result<BTreeMap<String, [usize; 2]>, AdapterError> {
        let modules = select_linear(&self.selection(strict), base)?;
        match modules.iter().find(|(_, dims)| dims.iter().any(|size| *size < self.r)) {
            None => Ok(modules),
            Some((path, dims)) => Err(AdapterError::Target {
                module: path.clone(),
                reason: format!("has a weight of shape {dims:?}, too small for r: {}", self.r),
            }),
        }
    }

    /// The selection of modules that the configuration means.
    pub fn selection(&self, strict: bool) -> Selection<'_> {
        let Targets { target_modules, exclude_modules, layers_to_transform, layers_pattern } = &self.targets;
        Selection {
            targets: target_modules.as_ref(),
            exclude: exclude_modules.as_ref(),
            saved: &[],
            layers: layers_to_transform.as_ref(),
            layers_pattern: layers_pattern.as_ref().map_or(&[], Names::as_slice),
            strict,
        }
    }
}

/// The keys that both methods have.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CoreBlock {
    /// Rank: `r²` numbers a module train.
    pub r: usize,
    /// `s`.
    pub scale: Option<f64>,
    /// In place of `scale`: `s = lora_alpha / r`.
    pub lora_alpha: Option<f64>,
    /// Dropout of the low-rank path's input in training.
    pub lora_dropout: f64,
    /// Where changes attach.
    #[serde(flatten)]
    pub targets: Targets,
    /// Columns of the decomposition's random subspace beyond the rank.
    pub svd_oversampling: usize,
    /// Its rounds of multiplication with the matrix and its transpose.
    pub svd_power_iterations: usize,
}

impl Default for CoreBlock {
    fn default() -> Self {
        Self {
            r: 32,
            scale: None,
            lora_alpha: None,
            lora_dropout: 0.0,
            targets: Targets::default(),
            svd_oversampling: 8,
            svd_power_iterations: 10,
        }
    }
}

impl CoreBlock {
    fn sketch(&self) -> Sketch {
        Sketch {
            rank: self.r,
            oversampling: self.svd_oversampling,
            power_iterations: self.svd_power_iterations,
        }
    }

    /// What the file will say, with the scale `scale`.
    fn config(&self, scale: f64) -> Result<CoreConfig, String> {
        let Self { r, lora_dropout, ref targets, .. } = *self;
        let config = CoreConfig { r, scale, lora_dropout, targets: targets.clone(), init: Value::Null };
        config.check()?;
        Ok(config)
    }
}

/// The block of LoRA-XS.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraXsBlock {
    /// Rank, scale, targets, decomposition.
    #[serde(flatten)]
    pub core: CoreBlock,
}

impl LoraXsBlock {
    /// The decomposition of the weights.
    pub fn sketch(&self) -> Sketch {
        self.core.sketch()
    }

    /// What the file will say. Without a word on the scale it is 1.
    ///
    /// # Errors
    /// A message about the first key that is out of range or at odds with another.
    pub fn config(&self) -> Result<CoreConfig, String> {
        let CoreBlock { r, scale, lora_alpha, .. } = self.core;
        let of_alpha = lora_alpha.map(|alpha| alpha / r as f64);
        match (scale, of_alpha) {
            (Some(scale), Some(of_alpha)) if scale != of_alpha => {
                Err(format!("scale is {scale}, but lora_alpha / r is {of_alpha}; keep one of them"))
            }
            (scale, of_alpha) => self.core.config(scale.or(of_alpha).unwrap_or(1.0)),
        }
    }
}

/// The block of LoRA-SB.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraSbBlock {
    /// Rank, scale, targets, decomposition.
    #[serde(flatten)]
    pub core: CoreBlock,
    /// Examples that the gradient is taken on: at most this many, evenly spread over the data.
    pub init_num_samples: Option<usize>,
    /// Examples a micro-batch of the estimate; those of training by default.
    pub init_batch_size: Option<usize>,
    /// `η`, the rate of the first step; by default that of the first step of the warm-up.
    pub eta: Option<f64>,
    /// The authors' released scripts to the letter: `η` from the number of the estimate's batches in an epoch in place of
    /// optimizer steps, and a decomposition without oversampling.
    pub paper_compat: bool,
}

impl LoraSbBlock {
    /// What the file will say. The scale is 1 unless `scale` says otherwise.
    ///
    /// # Errors
    /// A message about the first key that is out of range or at odds with another.
    pub fn config(&self) -> Result<CoreConfig, String> {
        let CoreBlock { r, scale, lora_alpha, .. } = self.core;
        if let Some(alpha) = lora_alpha.filter(|alpha| *alpha != r as f64 && scale.is_none()) {
            return Err(format!(
                "lora_alpha is {alpha}, but lora_sb has no scale to tune (alpha = r = {r}); remove it, or set scale \
                 if another one is meant"
            ));
        }
        for (key, value) in
            [("init_num_samples", self.init_num_samples), ("init_batch_size", self.init_batch_size)]
        {
            if value == Some(0) {
                return Err(format!("{key} is 0, expected a number above 0"));
            }
        }
        if let Some(eta) = self.eta.filter(|eta| !(eta.is_finite() && *eta > 0.0)) {
            return Err(format!("eta is {eta}, expected a positive rate"));
        }
        if self.eta.is_some() && self.paper_compat {
            return Err("eta and paper_compat both give the rate of the first step; keep one".to_string());
        }
        self.core.config(scale.unwrap_or(1.0))
    }

    /// The decomposition of the first step.
    pub fn sketch(&self) -> Sketch {
        match self.paper_compat {
            true => Sketch { rank: self.core.r, oversampling: 0, power_iterations: 10 },
            false => self.core.sketch(),
        }
    }
}
