//! What a LoRA's configuration means: where it attaches, what trains, ranks and scales.

use super::error::AdapterError;
use super::init::{CordaConfig, EvaConfig, InitLoraWeights, LoraGaConfig};
use super::targets::{Pattern, Selection, TargetModules, suffix_regex};
use fancy_regex::Regex;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Ranks above this are no adapter.
const MAX_RANK: usize = 1 << 16;

/// Which biases of the base train.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BiasTraining {
    /// None.
    #[default]
    None,
    /// Every bias of the model.
    All,
    /// Those of the targets.
    LoraOnly,
}

/// Layers by number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Layers {
    /// One layer.
    One(usize),
    /// Several.
    Many(Vec<usize>),
}

impl Layers {
    /// Whether none is named, which PEFT takes for all.
    pub fn is_empty(&self) -> bool {
        matches!(self, Layers::Many(many) if many.is_empty())
    }

    /// Whether `layer` is one of them.
    pub fn contains(&self, layer: usize) -> bool {
        match self {
            Layers::One(one) => *one == layer,
            Layers::Many(many) => many.contains(&layer),
        }
    }
}

/// One name or several.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Names {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl Names {
    /// As a list.
    pub fn as_slice(&self) -> &[String] {
        match self {
            Names::One(name) => std::slice::from_ref(name),
            Names::Many(names) => names,
        }
    }
}

/// Rows of the embedding that train: of the embedding layer, or by module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TokenIndices {
    /// Of the model's embedding.
    Embedding(Vec<u32>),
    /// By module name.
    ByModule(BTreeMap<String, Vec<u32>>),
}

/// Values by regular expression on the end of a module's path, in the order of the file: the first that matches counts.
pub type PatternMap<T> = Vec<(String, T)>;

/// What a LoRA's configuration says about its forward and what trains, in PEFT's keys.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraConfig {
    /// Rank where no pattern says otherwise.
    pub r: usize,
    /// Numerator of the scale where no pattern says otherwise.
    #[serde(serialize_with = "plain_number")]
    pub lora_alpha: f64,
    /// Dropout of the low-rank path's input in training.
    pub lora_dropout: f64,
    /// Scale alpha/√r instead of alpha/r.
    pub use_rslora: bool,
    /// Trains the rows' lengths apart from their directions (DoRA, arXiv 2402.09353).
    pub use_dora: bool,
    /// List of names, regular expression, or `all-linear`; none is q and v.
    pub target_modules: Option<TargetModules>,
    /// Left out.
    pub exclude_modules: Option<Pattern>,
    /// Only these layers, where targets are a list of names.
    pub layers_to_transform: Option<Layers>,
    /// Name of the list that layers are numbered in; any by default.
    pub layers_pattern: Option<Names>,
    /// Rank by module.
    #[serde(with = "rank_map")]
    pub rank_pattern: PatternMap<usize>,
    /// Alpha by module.
    #[serde(with = "alpha_map")]
    pub alpha_pattern: PatternMap<f64>,
    /// Which biases of the base train.
    pub bias: BiasTraining,
    /// A trained bias beside `B`.
    pub lora_bias: bool,
    /// Modules trained and saved whole.
    pub modules_to_save: Option<Vec<String>>,
    /// Rows of the embedding trained and saved alone.
    pub trainable_token_indices: Option<TokenIndices>,
    /// Where embedding and head share their weight and one of them trains: whether they go on sharing it. PEFT's default
    /// is false: the two part.
    pub ensure_weight_tying: Option<bool>,
    /// How the factors start.
    pub init_lora_weights: InitLoraWeights,
    /// Settings of `init_lora_weights: eva`.
    pub eva_config: Option<EvaConfig>,
    /// Settings of `init_lora_weights: corda`.
    pub corda_config: Option<CordaConfig>,
    /// Settings of `init_lora_weights: lora_ga`.
    pub lora_ga_config: Option<LoraGaConfig>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            use_dora: false,
            target_modules: None,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            bias: BiasTraining::None,
            lora_bias: false,
            modules_to_save: None,
            trainable_token_indices: None,
            ensure_weight_tying: None,
            init_lora_weights: InitLoraWeights::KaimingUniform,
            eva_config: None,
            corda_config: None,
            lora_ga_config: None,
        }
    }
}

/// An adapter's configuration: a LoRA on a named base.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct AdapterConfig {
    /// The LoRA.
    #[serde(flatten)]
    pub lora: LoraConfig,
    /// The base, as the user named it.
    pub base_model_name_or_path: Option<String>,
    /// Its revision.
    pub revision: Option<String>,
}

/// A whole number without a point, as PEFT's users write it.
fn plain_number<S: Serializer>(number: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    number_json(*number).serialize(serializer)
}

fn number_json(number: f64) -> Value {
    if number.fract() == 0.0 && number.abs() < 1e15 { json!(number as i64) } else { json!(number) }
}

/// Reads a map in its order; null is empty.
fn ordered<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    expected: &str,
    value: impl Fn(&Value) -> Option<T>,
) -> Result<PatternMap<T>, D::Error> {
    let map = Option::<Map<String, Value>>::deserialize(deserializer)?.unwrap_or_default();
    let entry = |(key, found): (String, Value)| match value(&found) {
        Some(parsed) => Ok((key, parsed)),
        None => Err(serde::de::Error::custom(format!("{key} is {found}, expected {expected}"))),
    };
    map.into_iter().map(entry).collect()
}

mod rank_map {
    use super::*;

    pub fn serialize<S: Serializer>(map: &PatternMap<usize>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(map.iter().map(|(key, rank)| (key, rank)))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PatternMap<usize>, D::Error> {
        ordered(deserializer, "a rank", |value| value.as_u64().and_then(|rank| usize::try_from(rank).ok()))
    }
}

mod alpha_map {
    use super::*;

    pub fn serialize<S: Serializer>(map: &PatternMap<f64>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(map.iter().map(|(key, alpha)| (key, number_json(*alpha))))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PatternMap<f64>, D::Error> {
        ordered(deserializer, "a number", Value::as_f64)
    }
}

impl LoraConfig {
    /// Checks that values are in range and go together.
    ///
    /// # Errors
    /// A message about the first that does not.
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
        if self.lora_bias && self.use_dora {
            return Err("lora_bias and use_dora exclude each other".to_string());
        }
        self.check_init()?;
        let by_name = matches!(&self.target_modules, Some(TargetModules::Matching(Pattern::Names(_))) | None);
        if self.layers_to_transform.is_some() && !by_name {
            return Err("layers_to_transform needs target_modules to be a list of names".to_string());
        }
        if self.layers_pattern.is_some() && self.layers_to_transform.is_none() {
            return Err("layers_pattern needs layers_to_transform beside it".to_string());
        }
        Ok(())
    }

    /// The selection of modules that the configuration means.
    pub fn selection(&self, strict: bool) -> Selection<'_> {
        Selection {
            targets: self.target_modules.as_ref(),
            exclude: self.exclude_modules.as_ref(),
            saved: self.modules_to_save(),
            layers: self.layers_to_transform.as_ref(),
            layers_pattern: self.layers_pattern.as_ref().map_or(&[], Names::as_slice),
            strict,
        }
    }

    /// The scale of a change: alpha/r, or alpha/√r (arXiv 2312.03732).
    pub fn scale(&self, alpha: f64, rank: usize) -> f64 {
        let rank = rank as f64;
        if self.use_rslora { alpha / rank.sqrt() } else { alpha / rank }
    }

    /// Names of the modules trained whole.
    pub fn modules_to_save(&self) -> &[String] {
        self.modules_to_save.as_deref().unwrap_or_default()
    }

    /// Resolves ranks and scales by module.
    ///
    /// # Errors
    /// A pattern that is no regular expression.
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
    config: &'a LoraConfig,
    ranks: Vec<(Regex, usize)>,
    alphas: Vec<(Regex, f64)>,
}

impl Patterns<'_> {
    /// Rank of the module at `path`.
    pub fn rank(&self, path: &str) -> usize {
        first_match(&self.ranks, path).unwrap_or(self.config.r)
    }

    /// Alpha of the module at `path`.
    pub fn alpha(&self, path: &str) -> f64 {
        first_match(&self.alphas, path).unwrap_or(self.config.lora_alpha)
    }

    /// Scale of the module at `path`.
    pub fn scale(&self, path: &str) -> f64 {
        let alpha = self.alpha(path);
        self.config.scale(alpha, self.rank(path))
    }
}

fn first_match<T: Copy>(patterns: &[(Regex, T)], path: &str) -> Option<T> {
    patterns.iter().find(|(regex, _)| regex.is_match(path).unwrap_or(false)).map(|(_, value)| *value)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn config(use_rslora: bool) -> LoraConfig {
        let ranks = json!({"layers\\.1\\..*proj": 2, "q_proj": 4});
        serde_json::from_value(
            json!({"r": 8, "lora_alpha": 16, "use_rslora": use_rslora, "rank_pattern": ranks}),
        )
        .unwrap()
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

    #[test]
    fn what_does_not_go_together_is_refused() {
        let check = |value: Value| serde_json::from_value::<LoraConfig>(value).unwrap().check();
        assert!(check(json!({"lora_bias": true, "use_dora": true})).unwrap_err().contains("use_dora"));
        assert!(check(json!({"target_modules": "all-linear", "layers_to_transform": 1})).is_err());
        assert!(check(json!({"layers_pattern": "layers"})).is_err());
        assert!(check(json!({"target_modules": ["q_proj"], "layers_to_transform": [0, 1]})).is_ok());
    }
}
