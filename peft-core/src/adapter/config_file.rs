//! `adapter_config.json` as Hugging Face PEFT writes it for a LoRA.

use super::config::{AdapterConfig, InitLoraWeights, alpha_pattern, rank_pattern};
use super::error::AdapterError;
use super::targets::{Pattern, TargetModules};
use crate::checkpoint::{ADAPTER_CONFIG_FILE, read_bounded, write_file};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::path::Path;

/// The version of the format written, as PEFT numbers it.
const PEFT_VERSION: &str = "0.21.2";

/// Bytes of the largest configuration read.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

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

/// The keys that are read, with PEFT's defaults.
#[derive(Deserialize)]
#[serde(default)]
struct Raw {
    r: usize,
    lora_alpha: f64,
    lora_dropout: f64,
    use_rslora: bool,
    target_modules: Option<TargetModules>,
    exclude_modules: Option<Pattern>,
    rank_pattern: Option<Map<String, Value>>,
    alpha_pattern: Option<Map<String, Value>>,
    modules_to_save: Option<Vec<String>>,
    init_lora_weights: Option<Value>,
    base_model_name_or_path: Option<String>,
    revision: Option<String>,
}

impl Default for Raw {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            target_modules: None,
            exclude_modules: None,
            rank_pattern: None,
            alpha_pattern: None,
            modules_to_save: None,
            init_lora_weights: None,
            base_model_name_or_path: None,
            revision: None,
        }
    }
}

impl AdapterConfig {
    /// Reads `adapter_config.json` from the adapter folder `dir`. Keys that are unknown come back as warnings.
    ///
    /// # Errors
    /// A file that is no LoRA's configuration, or asks for a forward that is not supported.
    pub fn read(dir: &Path) -> Result<(Self, Vec<String>), AdapterError> {
        let path = dir.join(ADAPTER_CONFIG_FILE);
        let bytes = read_bounded(&path, MAX_CONFIG_BYTES)?;
        let wrong = |message: String| AdapterError::Config { path: path.clone(), message };
        let json: Map<String, Value> =
            serde_json::from_slice(&bytes).map_err(|error| wrong(format!("not a JSON object: {error}")))?;
        match json.get("peft_type").and_then(Value::as_str) {
            Some("LORA") => {}
            other => return Err(wrong(format!("peft_type is {other:?}, expected \"LORA\""))),
        }
        let unsupported = |(key, neutral): &(String, Value)| {
            let value = json.get(key).unwrap_or(neutral);
            value != neutral && !is_empty(value)
        };
        if let Some((key, _)) = neutral_keys().into_iter().find(unsupported) {
            let value = json[&key].to_string();
            return Err(AdapterError::Unsupported { path: path.clone(), key, value });
        }

        let raw: Raw =
            serde_json::from_value(Value::Object(json.clone())).map_err(|error| wrong(error.to_string()))?;
        let init_lora_weights = match raw.init_lora_weights {
            // The values drawn are overwritten by the file's. What matters is whether the way changed the base.
            None | Some(Value::Bool(_)) => InitLoraWeights::KaimingUniform,
            Some(Value::String(name)) if name == "gaussian" => InitLoraWeights::Gaussian,
            Some(Value::String(name)) if ["eva", "orthogonal"].contains(&name.as_str()) => {
                InitLoraWeights::KaimingUniform
            }
            Some(value) => {
                let key = "init_lora_weights".to_string();
                return Err(AdapterError::Unsupported { path: path.clone(), key, value: value.to_string() });
            }
        };
        let known = Self {
            r: raw.r,
            lora_alpha: raw.lora_alpha,
            lora_dropout: raw.lora_dropout,
            use_rslora: raw.use_rslora,
            target_modules: raw.target_modules,
            exclude_modules: raw.exclude_modules,
            rank_pattern: rank_pattern(raw.rank_pattern.unwrap_or_default()).map_err(wrong)?,
            alpha_pattern: alpha_pattern(raw.alpha_pattern.unwrap_or_default()).map_err(wrong)?,
            modules_to_save: raw.modules_to_save.unwrap_or_default(),
            init_lora_weights,
            base_model_name_or_path: raw.base_model_name_or_path,
            revision: raw.revision,
        };
        known.check().map_err(wrong)?;
        let written = known.to_json();
        let unknown = json.keys().filter(|key| !written.contains_key(*key));
        let warnings = unknown
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
            if n.fract() == 0.0 && n.abs() < 1e15 { json!(n as i64) } else { json!(n) }
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
        put("exclude_modules", self.exclude_modules.as_ref().map_or(Value::Null, sorted));
        put("rank_pattern", self.rank_pattern.iter().map(|(key, rank)| (key.clone(), json!(rank))).collect());
        put(
            "alpha_pattern",
            self.alpha_pattern.iter().map(|(key, alpha)| (key.clone(), number(*alpha))).collect(),
        );
        let saved = (!self.modules_to_save.is_empty()).then_some(&self.modules_to_save);
        put("modules_to_save", json!(saved));
        put("init_lora_weights", json!(self.init_lora_weights));
        put("base_model_name_or_path", json!(self.base_model_name_or_path));
        put("revision", json!(self.revision));
        map.sort_keys();
        map
    }
}

/// Whether a configuration's value says nothing, in any of the ways JSON has for it: null, false, nothing inside.
pub fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}
