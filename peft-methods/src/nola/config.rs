//! The method block of a recipe.

use super::quantise::CoefficientBits;
use peft_core::adapter::{Layers, Pattern, Selection, TargetModules};
use serde::{Deserialize, Serialize};

/// Why bases are as large as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BasisScale {
    /// Uniform in ±1/√k: a combination with coefficients of 1 has entries of variance 1/3, whatever `k`.
    #[default]
    InvSqrtK,
    /// Uniform in ±1.
    None,
}

/// What `A` starts from beside its combination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OffsetA {
    /// A frozen draw from the law of LoRA's `A`, uniform in ±1/√in, from the same generator.
    #[default]
    Kaiming,
    /// Zero.
    None,
}

/// The first coefficients of `A`; those of `B` are zero, so that training starts at the base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AlphaInit {
    /// Zero.
    #[default]
    Zero,
    /// Normal, with the deviation that gives the entries of `A` the variance of LoRA's, 1/(3·in).
    Random,
}

/// Which modules share a basis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SeedPolicy {
    /// None.
    #[default]
    PerModule,
    /// Those of one shape: each basis is drawn once for all of them.
    Shared,
}

/// NOLA's keys.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NolaBlock {
    /// Rank of the factors.
    pub r: usize,
    /// The scale is `lora_alpha / r`.
    pub lora_alpha: f64,
    /// Probability of dropping an input feature of the low-rank path in training.
    pub lora_dropout: f64,
    /// Where changes attach.
    pub target_modules: Option<TargetModules>,
    /// Modules left out.
    pub exclude_modules: Option<Pattern>,
    /// Only these layers.
    pub layers_to_transform: Option<Layers>,
    /// `k`, random matrices that `A` is a combination of.
    pub num_basis_a: usize,
    /// `l`, those of `B`.
    pub num_basis_b: usize,
    /// How large the random matrices are.
    pub basis_scale: BasisScale,
    /// What `A` starts from.
    pub offset_a: OffsetA,
    /// The first coefficients of `A`.
    pub alpha_init: AlphaInit,
    /// Which modules share a basis.
    pub seed_policy: SeedPolicy,
    /// The seed of the bases; that of the run if there is none.
    pub basis_seed: Option<u64>,
    /// Bits of a coefficient in the adapter's file.
    pub coefficient_bits: CoefficientBits,
}

impl Default for NolaBlock {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            target_modules: None,
            exclude_modules: None,
            layers_to_transform: None,
            num_basis_a: 512,
            num_basis_b: 512,
            basis_scale: BasisScale::default(),
            offset_a: OffsetA::default(),
            alpha_init: AlphaInit::default(),
            seed_policy: SeedPolicy::default(),
            basis_seed: None,
            coefficient_bits: CoefficientBits::default(),
        }
    }
}

/// Random matrices of a basis, at most: an index has 32 bits, and far fewer are of use.
const MAX_BASIS: usize = 1 << 24;

impl NolaBlock {
    /// Checks that values are in range and go together.
    ///
    /// # Errors
    /// A message about the first that does not.
    pub fn check(&self) -> Result<(), String> {
        for (key, value, most) in [
            ("r", self.r, 1 << 20),
            ("num_basis_a", self.num_basis_a, MAX_BASIS),
            ("num_basis_b", self.num_basis_b, MAX_BASIS),
        ] {
            if !(1..=most).contains(&value) {
                return Err(format!("{key} is {value}, expected a number from 1 to {most}"));
            }
        }
        if !(self.lora_alpha.is_finite() && self.lora_alpha != 0.0) {
            return Err(format!("lora_alpha is {}, expected a number other than 0", self.lora_alpha));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(format!("lora_dropout is {}, expected a probability below 1", self.lora_dropout));
        }
        if self.offset_a == OffsetA::None && self.alpha_init == AlphaInit::Zero {
            return Err(
                "offset_a: none and alpha_init: zero make both factors zero, where no gradient leads away; \
                 keep offset_a: kaiming, or set alpha_init: random"
                    .to_string(),
            );
        }
        Ok(())
    }

    /// `s`.
    pub(super) fn scale(&self) -> f64 {
        self.lora_alpha / self.r as f64
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
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::{Value, json};

    fn check(keys: Value) -> Result<(), String> {
        serde_json::from_value::<NolaBlock>(keys).map_err(|error| error.to_string())?.check()
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (keys, says) in [
            (json!({"num_basis_a": 0}), "num_basis_a is 0"),
            (json!({"num_basis_b": 0}), "num_basis_b is 0"),
            (json!({"r": 0}), "r is 0"),
            (json!({"lora_alpha": 0}), "lora_alpha"),
            (json!({"lora_dropout": 1}), "lora_dropout"),
            (json!({"offset_a": "none"}), "no gradient"),
            (json!({"coefficient_bits": 3}), "none of 32, 8 and 4"),
            (json!({"basis_scale": "sqrt"}), "unknown variant"),
        ] {
            let error = check(keys.clone()).unwrap_err();
            assert!(error.contains(says), "{keys}: {error}");
        }
        check(json!({"offset_a": "none", "alpha_init": "random", "coefficient_bits": 4})).unwrap();
    }
}
