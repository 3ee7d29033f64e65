//! The method block of a recipe, and what it makes of a base's shapes.

use super::adamw::SparseAdamW;
use super::schedule::{ReselectionPolicy, Schedule};
use super::sm3::Sm3Config;
use peft_core::adapter::{AdapterError, Pattern, Selection, TargetModules, select};
use peft_core::checkpoint::Dtype;
use peft_core::kernels::{AdamW, AgedAdamW};
use peft_core::model::{EMBEDDING, HEAD, ModelConfig};
use serde::{Deserialize, Serialize};

/// How new positions are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Criterion {
    /// Where the gradient, summed over some steps, is largest; trained by AdamW.
    #[default]
    AccumulatedGradient,
    /// Where the moments of row and column are largest; trained by SM3.
    MomentApproximation,
}

/// Type of the values in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ValuesDtype {
    /// Two bytes a value.
    #[default]
    Bfloat16,
    /// Four, and exactly what was trained.
    Float32,
}

impl ValuesDtype {
    /// As files have it.
    pub fn dtype(self) -> Dtype {
        match self {
            ValuesDtype::Bfloat16 => Dtype::BF16,
            ValuesDtype::Float32 => Dtype::F32,
        }
    }
}

/// Keys of sparse fine-tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SparseBlock {
    /// How new positions are found.
    pub criterion: Criterion,
    /// Trained values as a share of all parameters of the model; 0.01 where neither this nor their number is given.
    pub density: Option<f64>,
    /// Trained values in all, in place of the share.
    pub num_tunable_weights: Option<u64>,
    /// Linear modules that get values; every one of the layers by default.
    pub target_modules: Option<TargetModules>,
    /// Modules left out.
    pub exclude_modules: Option<Pattern>,
    /// Steps between the beginnings of two selection phases.
    pub reselection_steps: u64,
    /// The step of each such interval after which positions are chosen again.
    pub selection_accumulation_steps: u64,
    /// Share of the positions that are chosen again, at the beginning of the run.
    pub initial_reselection_rate: f64,
    /// How that share falls.
    pub reselection_rate_policy: ReselectionPolicy,
    /// Added to the root of the second moment; 1e-6 for AdamW and 1e-8 for SM3 by default. `optimizer.eps` is not used.
    pub eps: Option<f64>,
    /// Momentum of SM3.
    pub momentum: f64,
    /// Starts new values at the age that the authors' program gives them, one less than it should be.
    pub compat_age: bool,
    /// Type of the values in the file; training has them in f32.
    pub values_dtype: ValuesDtype,
}

impl Default for SparseBlock {
    fn default() -> Self {
        Self {
            criterion: Criterion::AccumulatedGradient,
            density: None,
            num_tunable_weights: None,
            target_modules: Some(TargetModules::AllLinear),
            exclude_modules: None,
            reselection_steps: 20,
            selection_accumulation_steps: 5,
            initial_reselection_rate: 0.2,
            reselection_rate_policy: ReselectionPolicy::Linear,
            eps: None,
            momentum: 0.0,
            compat_age: false,
            values_dtype: ValuesDtype::Bfloat16,
        }
    }
}

/// A module that is to get values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its path.
    pub path: String,
    /// `[out, in]`.
    pub dims: [usize; 2],
    /// How many values it gets; none where its share is less than one.
    pub values: usize,
}

impl SparseBlock {
    /// Checks that values are in range and go together.
    ///
    /// # Errors
    /// A message about the first that does not.
    pub fn check(&self) -> Result<(), String> {
        if self.density.is_some() && self.num_tunable_weights.is_some() {
            return Err(
                "density and num_tunable_weights both say how many values train; keep one".to_string()
            );
        }
        if let Some(density) = self.density.filter(|density| !(*density > 0.0 && *density <= 1.0)) {
            return Err(format!("density is {density}, expected a share above 0 and at most 1"));
        }
        if self.num_tunable_weights == Some(0) {
            return Err("num_tunable_weights is 0, expected a number above 0".to_string());
        }
        let (steps, accumulation) = (self.reselection_steps, self.selection_accumulation_steps);
        if accumulation == 0 || accumulation >= steps {
            return Err(format!(
                "selection_accumulation_steps is {accumulation}, expected at least 1 and less than \
                 reselection_steps, which is {steps}"
            ));
        }
        let rate = self.initial_reselection_rate;
        if !(0.0..=1.0).contains(&rate) {
            return Err(format!("initial_reselection_rate is {rate}, expected a share from 0 to 1"));
        }
        if let Some(eps) = self.eps.filter(|eps| !(eps.is_finite() && *eps > 0.0)) {
            return Err(format!("eps is {eps}, expected a number above 0"));
        }
        if !(0.0..1.0).contains(&self.momentum) {
            return Err(format!("momentum is {}, expected a number from 0 to below 1", self.momentum));
        }
        let by_gradient = self.criterion == Criterion::AccumulatedGradient;
        if by_gradient && self.momentum > 0.0 {
            return Err("momentum goes with criterion: moment_approximation alone".to_string());
        }
        if !by_gradient && self.compat_age {
            return Err("compat_age goes with criterion: accumulated_gradient alone".to_string());
        }
        Ok(())
    }

    /// Checks that a run of that many steps goes on after its first choice of positions.
    ///
    /// # Errors
    /// A message that names both, and what to change.
    pub fn check_length(&self, total_steps: u64) -> Result<(), String> {
        let first = self.selection_accumulation_steps;
        if total_steps > first {
            return Ok(());
        }
        Err(format!(
            "the run has {total_steps} steps, and positions are chosen for the first time after step {first}, so that \
             what is chosen would never train: lower selection_accumulation_steps, which is {first}, or make the run \
             longer"
        ))
    }

    /// When positions are chosen again; `starts_at_random` says where the first ones come from.
    pub fn schedule(&self, starts_at_random: bool) -> Schedule {
        Schedule {
            reselection_steps: self.reselection_steps,
            accumulation_steps: self.selection_accumulation_steps,
            initial_rate: self.initial_reselection_rate,
            policy: self.reselection_rate_policy,
            starts_at_random,
        }
    }

    /// AdamW with the recipe's decays.
    pub fn adamw(&self, recipe: &AdamW) -> SparseAdamW {
        SparseAdamW(AgedAdamW {
            beta_1: recipe.beta_1,
            beta_2: recipe.beta_2,
            epsilon: self.eps.unwrap_or(1e-6),
            weight_decay: recipe.weight_decay,
        })
    }

    /// SM3 with the recipe's weight decay.
    pub fn sm3(&self, recipe: &AdamW) -> Sm3Config {
        Sm3Config {
            epsilon: self.eps.unwrap_or(1e-8),
            weight_decay: recipe.weight_decay,
            momentum: self.momentum,
        }
    }

    /// The modules of a model that are targeted, with their shares of the values: `⌊K·Nₘ/ΣN⌋` of `K` for a module of `Nₘ`
    /// weights.
    ///
    /// # Errors
    /// Targets that match nothing or are no linear modules of their own; more values than weights, or none anywhere.
    pub fn targets(&self, model: &ModelConfig) -> Result<Vec<Target>, AdapterError> {
        let shapes = model.base_shapes();
        let matrices: Vec<&str> = shapes
            .weights
            .iter()
            .filter(|(_, shape)| shape.len() == 2)
            .map(|(path, _)| path.as_str())
            .collect();
        let selection = Selection {
            targets: self.target_modules.as_ref(),
            exclude: self.exclude_modules.as_ref(),
            saved: &[],
            layers: None,
            layers_pattern: &[],
            strict: true,
        };
        let chosen = select(&selection, &matrices)?;
        let wrong =
            |module: &str, reason: String| AdapterError::Target { module: module.to_string(), reason };
        if chosen.contains(&EMBEDDING) {
            let reason = "is an embedding: sparse values go into linear modules";
            return Err(wrong(EMBEDDING, reason.to_string()));
        }
        if chosen.contains(&HEAD) && shapes.tied {
            let reason =
                "shares its weight with the embedding (tie_word_embeddings): values in one would be in both";
            return Err(wrong(HEAD, reason.to_string()));
        }
        let places = |path: &str| shapes.weights[path].iter().map(|length| *length as u128).product::<u128>();
        let all: u128 = chosen.iter().map(|path| places(path)).sum();
        let own: u64 = model.parameters().iter().map(|parameter| parameter.numel()).sum();
        let total = match (self.num_tunable_weights, self.density) {
            (Some(count), _) => count,
            (None, density) => (density.unwrap_or(0.01) * own as f64).floor() as u64,
        };
        if u128::from(total) > all {
            return Err(wrong(
                "target_modules",
                format!(
                    "have {all} weights, but {total} values are to train: lower density (a share of all {own} \
                     parameters of the model) or num_tunable_weights"
                ),
            ));
        }
        let mut targets = Vec::with_capacity(chosen.len());
        for path in chosen {
            let dims = [shapes.weights[path][0], shapes.weights[path][1]];
            if places(path) > i32::MAX as u128 {
                let reason = format!("has {}×{} weights, more than positions can count", dims[0], dims[1]);
                return Err(wrong(path, reason));
            }
            let values = (u128::from(total) * places(path) / all) as usize;
            targets.push(Target { path: path.to_string(), dims, values });
        }
        match targets.iter().any(|target| target.values > 0) {
            true => Ok(targets),
            false => Err(wrong(
                "target_modules",
                format!("get no value, with {total} for all of them: raise density or num_tunable_weights"),
            )),
        }
    }
}
