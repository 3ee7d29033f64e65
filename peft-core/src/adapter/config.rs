//! `adapter_config.json` as Hugging Face PEFT writes it for a LoRA.

use super::error::AdapterError;
use super::targets::{Pattern, Selection, TargetModules, suffix_regex};
use crate::checkpoint::{ADAPTER_CONFIG_FILE, read_bounded, write_file};
use fancy_regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::path::Path;

/// The version of the format written, as PEFT numbers it.
const PEFT_VERSION: &str = "0.21.2";

/// Bytes of the largest configuration read.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

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
            other => Err(serde::de::Error::custom(format!(
                "{other} is no initialisation: true or \"gaussian\""
            ))),
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

/// Keys that are carried for other programs and change nothing here, with the value that PEFT writes by default.
fn inert_keys() -> Map<String, Value> {
    let Value::Object(map) = json!({
        "auto_mapping": null, "inference_mode": true, "loftq_config": {}, "megatron_core": "megatron.core",
        "qalora_group_size": 16, "task_type": "CAUSAL_LM",
    }) else {
        return Map::new();
    };
    map
}

/// Keys that would change the forward or the set of tensors, with their neutral value: any other value is refused.
fn neutral_keys() -> Map<String, Value> {
    let Value::Object(map) = json!({
        "alora_invocation_tokens": null, "arrow_config": null, "bias": "none", "corda_config": null,
        "ensure_weight_tying": false, "eva_config": null, "fan_in_fan_out": false, "kasa_config": null,
        "layer_replication": null, "layers_pattern": null, "layers_to_transform": null, "lora_bias": false,
        "lora_ga_config": null, "megatron_config": null, "monteclora_config": null, "target_parameters": null,
        "trainable_token_indices": null, "use_bdlora": null, "use_dora": false, "use_qalora": false,
        "velora_config": null,
    }) else {
        return Map::new();
    };
    map
}

impl AdapterConfig {
    /// Reads `adapter_config.json` from the adapter folder `dir`. Keys that no version of PEFT gave a meaning are
    /// returned as warnings.
    pub fn read(dir: &Path) -> Result<(Self, Vec<String>), AdapterError> {
        let path = dir.join(ADAPTER_CONFIG_FILE);
        let bytes = read_bounded(&path, MAX_CONFIG_BYTES)?;
        let config = |message: String| AdapterError::Config {
            path: path.clone(),
            message,
        };
        let json: Map<String, Value> =
            serde_json::from_slice(&bytes).map_err(|error| config(format!("not a JSON object: {error}")))?;
        match json.get("peft_type").and_then(Value::as_str) {
            Some("LORA") => {}
            other => return Err(config(format!("peft_type is {other:?}, expected \"LORA\""))),
        }
        for (key, neutral) in neutral_keys() {
            let value = json.get(&key).unwrap_or(&neutral);
            let empty = value.is_null()
                || *value == Value::Bool(false)
                || value.as_array().is_some_and(Vec::is_empty)
                || value.as_object().is_some_and(Map::is_empty);
            if *value != neutral && !empty {
                return Err(AdapterError::Unsupported {
                    path: path.clone(),
                    key,
                    value: value.to_string(),
                });
            }
        }

        #[derive(Deserialize)]
        struct Raw {
            #[serde(default = "eight")]
            r: usize,
            #[serde(default = "eight_alpha")]
            lora_alpha: f64,
            #[serde(default)]
            lora_dropout: f64,
            #[serde(default)]
            use_rslora: bool,
            target_modules: Option<TargetModules>,
            exclude_modules: Option<Pattern>,
            #[serde(default)]
            rank_pattern: Option<Map<String, Value>>,
            #[serde(default)]
            alpha_pattern: Option<Map<String, Value>>,
            modules_to_save: Option<Vec<String>>,
            init_lora_weights: Option<Value>,
            base_model_name_or_path: Option<String>,
            revision: Option<String>,
        }
        fn eight() -> usize {
            8
        }
        fn eight_alpha() -> f64 {
            8.0
        }
        let raw: Raw =
            serde_json::from_value(Value::Object(json.clone())).map_err(|error| config(error.to_string()))?;
        let rank_pattern = raw
            .rank_pattern
            .unwrap_or_default()
            .into_iter()
            .map(|(key, value)| {
                let rank = value.as_u64().and_then(|rank| usize::try_from(rank).ok());
                let rank =
                    rank.ok_or_else(|| config(format!("rank_pattern.{key} is {value}, expected a rank")))?;
                Ok((key, rank))
            })
            .collect::<Result<Vec<_>, AdapterError>>()?;
        let alpha_pattern = raw
            .alpha_pattern
            .unwrap_or_default()
            .into_iter()
            .map(|(key, value)| {
                let alpha = value.as_f64();
                let alpha = alpha
                    .ok_or_else(|| config(format!("alpha_pattern.{key} is {value}, expected a number")))?;
                Ok((key, alpha))
            })
            .collect::<Result<Vec<_>, AdapterError>>()?;
        // The initial values are overwritten by the file's, so an unknown way to draw them is no obstacle; a way that
        // changed the base is.
        let init = match raw.init_lora_weights {
            None | Some(Value::Bool(_)) => InitLoraWeights::KaimingUniform,
            Some(Value::String(name)) => match name.as_str() {
                "gaussian" => InitLoraWeights::Gaussian,
                "eva" | "orthogonal" => InitLoraWeights::KaimingUniform,
                _ => {
                    let key = "init_lora_weights".to_string();
                    return Err(AdapterError::Unsupported {
                        path: path.clone(),
                        key,
                        value: name,
                    });
                }
            },
            Some(other) => return Err(config(format!("init_lora_weights is {other}"))),
        };
        let known = Self {
            r: raw.r,
            lora_alpha: raw.lora_alpha,
            lora_dropout: raw.lora_dropout,
            use_rslora: raw.use_rslora,
            target_modules: raw.target_modules,
            exclude_modules: raw.exclude_modules,
            rank_pattern,
            alpha_pattern,
            modules_to_save: raw.modules_to_save.unwrap_or_default(),
            init_lora_weights: init,
            base_model_name_or_path: raw.base_model_name_or_path,
            revision: raw.revision,
        };
        let ranks = std::iter::once(known.r).chain(known.rank_pattern.iter().map(|(_, rank)| *rank));
        if let Some(rank) = ranks.into_iter().find(|rank| !(1..=MAX_RANK).contains(rank)) {
            return Err(config(format!("rank {rank} is not between 1 and {MAX_RANK}")));
        }
        let written = known.to_json();
        let warnings = json
            .keys()
            .filter(|key| !written.contains_key(*key))
            .map(|key| format!("{}: key `{key}` is unknown and was ignored", path.display()))
            .collect();
        Ok((known, warnings))
    }

    /// Writes `adapter_config.json`: sorted keys, two spaces, as PEFT does.
    pub fn write(&self, dir: &Path) -> Result<(), AdapterError> {
        let text = format!("{:#}", Value::Object(self.to_json()));
        write_file(&dir.join(ADAPTER_CONFIG_FILE), text.as_bytes())?;
        Ok(())
    }

    /// The file's content.
    pub fn to_json(&self) -> Map<String, Value> {
        let sorted = |pattern: &Pattern| match pattern {
            Pattern::Names(names) => {
                let mut names = names.clone();
                names.sort();
                json!(names)
            }
            Pattern::Regex(regex) => json!(regex),
        };
        let number = |n: f64| {
            if n.fract() == 0.0 && n.abs() < 1e15 {
                json!(n as i64)
            } else {
                json!(n)
            }
        };
        let mut map = inert_keys();
        map.append(&mut neutral_keys());
        let mut put = |key: &str, value: Value| map.insert(key.to_string(), value);
        put("peft_type", json!("LORA"));
        put("peft_version", json!(PEFT_VERSION));
        put("r", json!(self.r));
        put("lora_alpha", number(self.lora_alpha));
        put("lora_dropout", json!(self.lora_dropout));
        put("use_rslora", json!(self.use_rslora));
        put(
            "target_modules",
            match &self.target_modules {
                None => Value::Null,
                Some(TargetModules::AllLinear) => json!("all-linear"),
                Some(TargetModules::Matching(pattern)) => sorted(pattern),
            },
        );
        put(
            "exclude_modules",
            self.exclude_modules.as_ref().map_or(Value::Null, sorted),
        );
        put(
            "rank_pattern",
            self.rank_pattern
                .iter()
                .map(|(key, rank)| (key.clone(), json!(rank)))
                .collect(),
        );
        put(
            "alpha_pattern",
            self.alpha_pattern
                .iter()
                .map(|(key, alpha)| (key.clone(), number(*alpha)))
                .collect(),
        );
        let saved = (!self.modules_to_save.is_empty()).then_some(&self.modules_to_save);
        put("modules_to_save", json!(saved));
        put("init_lora_weights", json!(self.init_lora_weights));
        put("base_model_name_or_path", json!(self.base_model_name_or_path));
        put("revision", json!(self.revision));
        map.sort_keys();
        map
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
        Ok(Patterns {
            config: self,
            ranks: self
                .rank_pattern
                .iter()
                .map(|(k, r)| Ok((suffix_regex("rank_pattern", k)?, *r)))
                .collect::<Result<_, AdapterError>>()?,
            alphas: self
                .alpha_pattern
                .iter()
                .map(|(k, a)| Ok((suffix_regex("alpha_pattern", k)?, *a)))
                .collect::<Result<_, AdapterError>>()?,
        })
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
        if self.config.use_rslora {
            alpha / rank.sqrt()
        } else {
            alpha / rank
        }
    }
}

fn first_match<T: Copy>(patterns: &[(Regex, T)], path: &str) -> Option<T> {
    patterns
        .iter()
        .find(|(regex, _)| regex.is_match(path).unwrap_or(false))
        .map(|(_, value)| *value)
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
        assert_eq!(
            config(false)
                .patterns()
                .unwrap()
                .scale("model.layers.0.mlp.up_proj"),
            2.0
        );
        let rank_stabilised = config(true)
            .patterns()
            .unwrap()
            .scale("model.layers.0.mlp.up_proj");
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
