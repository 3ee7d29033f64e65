//! What a LoRA's configuration means: where it attaches, ranks and scales.

use super::error::AdapterError;
use super::targets::{Pattern, Selection, TargetModules, suffix_regex};
use fancy_regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Ranks above this are no adapter.
const MAX_RANK: usize = 1 << 16;

/// How the factors start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum InitLoraWeights {
    /// `A` uniform in ±1/√in (Kaiming with a = √5), `B` zero.
    #[default]
    KaimingUniform,
    /// `A` normal with deviation 1/r, `B` zero.
    Gaussian,
}

impl Serialize for InitLoraWeights {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            InitLoraWeights::KaimingUniform => serializer.serialize_bool(true),
            InitLoraWeights::Gaussian => serializer.serialize_str("gaussian"),
        }
    }
}

impl<'de> Deserialize<'de> for InitLoraWeights {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::Bool(true) => Ok(InitLoraWeights::KaimingUniform),
            Value::String(name) if name == "gaussian" => Ok(InitLoraWeights::Gaussian),
            other => {
                Err(serde::de::Error::custom(format!("{other} is no initialisation: true or \"gaussian\"")))
            }
        }
    }
}

/// What a LoRA's configuration says about its forward.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// Rank where no pattern says otherwise.
    pub r: usize,
    /// Alpha where no pattern says otherwise.
    pub lora_alpha: f64,
    /// Dropout in training.
    pub lora_dropout: f64,
    /// Scale alpha/√r instead of alpha/r.
    pub use_rslora: bool,
    /// Where changes attach.
    pub target_modules: Option<TargetModules>,
    /// Where they do not.
    pub exclude_modules: Option<Pattern>,
    /// Rank by regular expression on the end of a module's path; the first that matches counts.
    pub rank_pattern: Vec<(String, usize)>,
    /// Alpha likewise.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Modules trained and saved whole.
    pub modules_to_save: Vec<String>,
    /// How the factors started.
    pub init_lora_weights: InitLoraWeights,
    /// The base, as the user named it.
    pub base_model_name_or_path: Option<String>,
    /// Its revision.
    pub revision: Option<String>,
}

/// The entries of a `rank_pattern`, in their order.
///
/// # Errors
/// A message about the first value that is no rank.
pub fn rank_pattern(map: serde_json::Map<String, Value>) -> Result<Vec<(String, usize)>, String> {
    let entry =
        |(key, value): (String, Value)| match value.as_u64().and_then(|rank| usize::try_from(rank).ok()) {
            Some(rank) => Ok((key, rank)),
            None => Err(format!("rank_pattern.{key} is {value}, expected a rank")),
        };
    map.into_iter().map(entry).collect()
}

/// The entries of an `alpha_pattern`, in their order.
///
/// # Errors
/// A message about the first value that is no number.
pub fn alpha_pattern(map: serde_json::Map<String, Value>) -> Result<Vec<(String, f64)>, String> {
    let entry = |(key, value): (String, Value)| match value.as_f64() {
        Some(alpha) => Ok((key, alpha)),
        None => Err(format!("alpha_pattern.{key} is {value}, expected a number")),
    };
    map.into_iter().map(entry).collect()
}

impl AdapterConfig {
    /// Checks that ranks, alphas and dropout are in range.
    ///
    /// # Errors
    /// A message about the first that is not.
    pub fn check(&self) -> Result<(), String> {
        let patterns = self.rank_pattern.iter().map(|(key, rank)| (format!("rank_pattern.{key}"), *rank));
        for (key, rank) in std::iter::once(("r".to_string(), self.r)).chain(patterns) {
            if !(1..=MAX_RANK).contains(&rank) {
                return Err(format!("{key} is {rank}, expected a rank from 1 to {MAX_RANK}"));
            }
        }
        let patterns = self.alpha_pattern.iter().map(|(key, alpha)| (format!("alpha_pattern.{key}"), *alpha));
        for (key, alpha) in std::iter::once(("lora_alpha".to_string(), self.lora_alpha)).chain(patterns) {
            if !(alpha.is_finite() && alpha > 0.0) {
                return Err(format!("{key} is {alpha}, expected a positive number"));
            }
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return Err(format!("lora_dropout is {}, expected a probability below 1", self.lora_dropout));
        }
        Ok(())
    }

    /// The selection of modules that the configuration means.
    pub fn selection(&self, strict: bool) -> Selection<'_> {
        Selection {
            targets: self.target_modules.as_ref(),
            exclude: self.exclude_modules.as_ref(),
            saved: &self.modules_to_save,
            strict,
        }
    }

    /// Resolves ranks and scales by module.
    pub fn patterns(&self) -> Result<Patterns<'_>, AdapterError> {
        let mut patterns = Patterns { config: self, ranks: Vec::new(), alphas: Vec::new() };
        for (key, rank) in &self.rank_pattern {
            patterns.ranks.push((suffix_regex("rank_pattern", key)?, *rank));
        }
        for (key, alpha) in &self.alpha_pattern {
            patterns.alphas.push((suffix_regex("alpha_pattern", key)?, *alpha));
        }
        Ok(patterns)
    }
}

/// Compiled rank and alpha patterns.
pub struct Patterns<'a> {
    config: &'a AdapterConfig,
    ranks: Vec<(Regex, usize)>,
    alphas: Vec<(Regex, f64)>,
}

impl Patterns<'_> {
    /// Rank of the module at `path`.
    pub fn rank(&self, path: &str) -> usize {
        first_match(&self.ranks, path).unwrap_or(self.config.r)
    }

    /// Scale of the module at `path`: alpha/r, or alpha/√r (arXiv 2312.03732).
    pub fn scale(&self, path: &str) -> f64 {
        let alpha = first_match(&self.alphas, path).unwrap_or(self.config.lora_alpha);
        let rank = self.rank(path) as f64;
        if self.config.use_rslora { alpha / rank.sqrt() } else { alpha / rank }
    }
}

fn first_match<T: Copy>(patterns: &[(Regex, T)], path: &str) -> Option<T> {
    patterns.iter().find(|(regex, _)| regex.is_match(path).unwrap_or(false)).map(|(_, value)| *value)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn config(use_rslora: bool) -> AdapterConfig {
        AdapterConfig {
            r: 8,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            use_rslora,
            target_modules: None,
            exclude_modules: None,
            rank_pattern: vec![(r"layers\.1\..*proj".to_string(), 2), ("q_proj".to_string(), 4)],
            alpha_pattern: vec![],
            modules_to_save: vec![],
            init_lora_weights: InitLoraWeights::KaimingUniform,
            base_model_name_or_path: None,
            revision: None,
        }
    }

    #[test]
    fn scales() {
        assert_eq!(config(false).patterns().unwrap().scale("model.layers.0.mlp.up_proj"), 2.0);
        let rank_stabilised = config(true).patterns().unwrap().scale("model.layers.0.mlp.up_proj");
        assert!((rank_stabilised - 5.656_854).abs() < 1e-6);
    }

    #[test]
    fn the_first_pattern_that_matches_the_end_of_the_path_counts() {
        let config = config(false);
        let patterns = config.patterns().unwrap();
        assert_eq!(patterns.rank("model.layers.1.self_attn.q_proj"), 2);
        assert_eq!(patterns.rank("model.layers.0.self_attn.q_proj"), 4);
        assert_eq!(patterns.rank("model.layers.0.self_attn.eq_proj"), 8);
    }
}
