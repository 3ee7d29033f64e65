//! The method block of a recipe.

use peft_core::adapter::{InitLoraWeights, LoraConfig};
use serde::{Deserialize, Serialize};

/// PEFT's keys of a LoRA, and those that only training knows.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraBlock {
    /// What the adapter is.
    #[serde(flatten)]
    pub lora: LoraConfig,
    /// Examples that data-driven first values are computed from: at most this many, evenly spread over the data.
    pub init_num_samples: Option<usize>,
    /// How much faster `B` learns than `A` (LoRA+, arXiv 2402.12354); also a bias, a magnitude.
    pub loraplus_lr_ratio: Option<f64>,
    /// Learning rate of a change of the embedding under LoRA+; 1e-6 by default, as in PEFT.
    pub loraplus_lr_embedding: Option<f64>,
    /// Freezes `A` and corrects the gradient of `B` for it (LoRA-FA, arXiv 2308.03303).
    pub lora_fa: bool,
}

impl LoraBlock {
    /// As [`check`](Self::check), for a run whose first values come from an adapter or are drawn.
    ///
    /// # Errors
    /// A message about the first key that is out of range or does not go with the adapter.
    pub(super) fn check_start(&self, starts_from_adapter: bool) -> Result<(), String> {
        self.check()?;
        let drawn = [InitLoraWeights::KaimingUniform, InitLoraWeights::Gaussian];
        if starts_from_adapter && !drawn.contains(&self.lora.init_lora_weights) {
            return Err(
                "init_lora_weights and adapter_name_or_path both give first values; remove one".to_string()
            );
        }
        Ok(())
    }

    /// Checks that values are in range and go together.
    ///
    /// # Errors
    /// A message about the first that does not.
    pub fn check(&self) -> Result<(), String> {
        self.lora.check()?;
        if self.lora_fa && (self.lora.use_dora || self.lora.lora_bias || self.loraplus_lr_ratio.is_some()) {
            return Err("lora_fa goes with neither use_dora, lora_bias nor loraplus_lr_ratio".to_string());
        }
        if self.init_num_samples == Some(0) {
            return Err("init_num_samples is 0, expected a number above 0".to_string());
        }
        if let Some(ratio) = self.loraplus_lr_ratio.filter(|ratio| !(ratio.is_finite() && *ratio > 0.0)) {
            return Err(format!(
                "loraplus_lr_ratio is {ratio}, expected a positive number (usually above 1)"
            ));
        }
        if let Some(rate) = self.loraplus_lr_embedding {
            if self.loraplus_lr_ratio.is_none() {
                return Err("loraplus_lr_embedding needs loraplus_lr_ratio beside it".to_string());
            }
            if !(rate.is_finite() && rate >= 0.0) {
                return Err(format!("loraplus_lr_embedding is {rate}, expected a learning rate"));
            }
        }
        Ok(())
    }
}
