//! The method block of a recipe.

use super::freezing::Freezing;
use super::ranks::RankAllocation;
use peft_core::adapter::{AdapterError, Layers, Pattern, Selection, TargetModules, select_linear};
use peft_core::model::BaseShapes;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What the factors start from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LamdaInit {
    /// The largest singular values and vectors of the weight, `B = U_r`, `S = Σ_r/s`, `A = V_rᵀ`.
    #[default]
    SvdPrincipal,
    /// The same vectors with `S = 0`.
    SvdNoResidual,
    /// As the authors' program has it without a decomposition: `A` and `S` Kaiming-uniform, `S` rounded to bf16, `B` zero.
    ReleasedLora,
}

/// LaMDA's keys.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LamdaBlock {
    /// Rank; with a `rank_allocation` the mean over the modules.
    pub r: usize,
    /// The scale is `lora_alpha / r` for all modules, whatever their rank.
    pub lora_alpha: f64,
    /// Probability of dropping an input feature of the path in training.
    pub lora_dropout: f64,
    /// Where changes attach.
    pub target_modules: Option<TargetModules>,
    /// Modules left out.
    pub exclude_modules: Option<Pattern>,
    /// Only these layers.
    pub layers_to_transform: Option<Layers>,
    /// What the factors start from.
    pub init: LamdaInit,
    /// Whether the first product is taken off the base; as `init` has it by default.
    pub subtract_init: Option<bool>,
    /// η: the share of the run over which the columns of `B` freeze.
    pub eta: f64,
    /// Freezes as the authors' program does, by a rule that hardly freezes anything and the gradient alone.
    pub compat_released: bool,
    /// LaMDA++: ranks by the spectra of the weights.
    pub rank_allocation: Option<RankAllocation>,
    /// Ranks other than `r`, by path; 0 leaves a module alone.
    pub rank_pattern: BTreeMap<String, usize>,
}

impl Default for LamdaBlock {
    fn default() -> Self {
        Self {
            r: 32,
            lora_alpha: 32.0,
            lora_dropout: 0.0,
            target_modules: None,
            exclude_modules: None,
            layers_to_transform: None,
            init: LamdaInit::default(),
            subtract_init: None,
            eta: 0.3,
            compat_released: false,
            rank_allocation: None,
            rank_pattern: BTreeMap::new(),
        }
    }
}

/// Ranks above this are no adapter.
const MAX_RANK: usize = 1 << 16;

impl LamdaBlock {
    /// Checks that values are in range and go together.
    ///
    /// # Errors
    /// A message about the first that does not.
    pub fn check(&self) -> Result<(), String> {
        if !(1..=MAX_RANK).contains(&self.r) {
            return Err(format!("r is {}, expected a rank from 1 to {MAX_RANK}", self.r));
        }
        if !(self.lora_alpha.is_finite() && self.lora_alpha != 0.0) {
            return Err(format!("lora_alpha is {}, expected a number other than 0", self.lora_alpha));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(format!("lora_dropout is {}, expected a probability below 1", self.lora_dropout));
        }
        if !(0.0..=1.0).contains(&self.eta) {
            return Err(format!("eta is {}, expected a share of the run from 0 to 1", self.eta));
        }
        if self.compat_released && self.eta == 0.0 {
            return Err("compat_released divides by eta, which is 0".to_string());
        }
        if self.eta == 0.0 && self.init == LamdaInit::ReleasedLora {
            return Err(
                "eta: 0 and init: released_lora leave B zero for ever; nothing would train".to_string()
            );
        }
        if self.subtract_init == Some(true) && self.init != LamdaInit::SvdPrincipal {
            return Err(
                "subtract_init: true needs init: svd_principal; other first products are zero".to_string()
            );
        }
        if self.rank_allocation.is_some() && !self.rank_pattern.is_empty() {
            return Err("rank_allocation and rank_pattern both give ranks; remove one".to_string());
        }
        if self.rank_allocation.is_some() && self.init == LamdaInit::ReleasedLora {
            return Err(
                "rank_allocation goes by the decompositions that init: released_lora leaves out".to_string()
            );
        }
        Ok(())
    }

    /// `s`.
    pub(super) fn scale(&self) -> f64 {
        self.lora_alpha / self.r as f64
    }

    /// Whether `B₀·S₀` is taken off the base.
    pub(super) fn subtracts(&self) -> bool {
        self.init == LamdaInit::SvdPrincipal && self.subtract_init != Some(false)
    }

    pub(super) fn freezing(&self) -> Freezing {
        Freezing { eta: self.eta, as_released: self.compat_released }
    }

    /// The modules asked for.
    pub(super) fn selection(&self, strict: bool) -> Selection<'_> {
        Selection {
            targets: self.target_modules.as_ref(),
            exclude: self.exclude_modules.as_ref(),
            saved: &[],
            layers: self.layers_to_transform.as_ref(),
            layers_pattern: &[],
            strict,
        }
    }

    /// The modules on a base, with `[out, in]` and rank, those of rank 0 left out. With a `rank_allocation` all have the
    /// mean rank.
    ///
    /// # Errors
    /// Targets that match nothing; a rank above a side of the weight; a path in `rank_pattern` that is no target.
    pub(super) fn modules(
        &self,
        base: &BaseShapes,
        strict: bool,
    ) -> Result<BTreeMap<String, ([usize; 2], usize)>, AdapterError> {
        let chosen = select_linear(&self.selection(strict), base)?;
        if let Some(path) = self.rank_pattern.keys().find(|path| !chosen.contains_key(*path)) {
            let reason = "has a rank in rank_pattern and is no target".to_string();
            return Err(AdapterError::Target { module: path.clone(), reason });
        }
        let mut modules = BTreeMap::new();
        for (path, dims) in chosen {
            let rank = self.rank_pattern.get(&path).copied().unwrap_or(self.r);
            if rank > dims[0].min(dims[1]) {
                let reason = format!("has a weight {dims:?}, which has no rank of {rank}");
                return Err(AdapterError::Target { module: path, reason });
            }
            if rank > 0 {
                modules.insert(path, (dims, rank));
            }
        }
        Ok(modules)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn what_cannot_be_is_refused() {
        let check = |keys: Value| serde_json::from_value::<LamdaBlock>(keys).unwrap().check();
        for (keys, says) in [
            (json!({"r": 0}), "r is 0"),
            (json!({"eta": 1.5}), "eta is 1.5"),
            (json!({"eta": -0.1}), "eta is -0.1"),
            (json!({"lora_alpha": 0.0}), "lora_alpha"),
            (json!({"lora_dropout": 1.0}), "lora_dropout"),
            (json!({"eta": 0.0, "compat_released": true}), "divides by eta"),
            (json!({"eta": 0.0, "init": "released_lora"}), "nothing would train"),
            (json!({"subtract_init": true, "init": "svd_no_residual"}), "subtract_init"),
            (json!({"rank_allocation": {}, "rank_pattern": {"q": 2}}), "both give ranks"),
        ] {
            let error = check(keys.clone()).unwrap_err();
            assert!(error.contains(says), "{keys}: {error}");
        }
        check(json!({"eta": 0.0})).unwrap();
    }
}
