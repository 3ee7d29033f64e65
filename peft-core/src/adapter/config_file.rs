//! `adapter_config.json` as Hugging Face PEFT writes it for a LoRA.

use super::config::AdapterConfig;
use super::error::AdapterError;
use super::folder::{AdapterFolder, PEFT_VERSION};
use super::init::InitLoraWeights;
use crate::checkpoint::{ADAPTER_CONFIG_FILE, write_file};
use serde_json::{Map, Value, json};
use std::path::Path;

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
        "alora_invocation_tokens": null, "arrow_config": null, "fan_in_fan_out": false, "kasa_config": null,
        "layer_replication": null, "megatron_config": null, "monteclora_config": null, "target_parameters": null,
        "use_bdlora": null, "use_qalora": false, "velora_config": null,
    }) else {
        return Map::new();
    };
    map
}

impl AdapterConfig {
    /// Reads `adapter_config.json` from the adapter folder `dir`. Keys that are unknown come back as warnings.
    ///
    /// # Errors
    /// A file that is no LoRA's configuration, or asks for a forward that is not supported.
    pub fn read(dir: &Path) -> Result<(Self, Vec<String>), AdapterError> {
        let path = dir.join(ADAPTER_CONFIG_FILE);
        let wrong = |message: String| AdapterError::Config { path: path.clone(), message };
        let json = AdapterFolder::read_config(dir)?;
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

        let mut known = json.clone();
        match json.get("init_lora_weights") {
            // PEFT's `false` leaves random values, which are overwritten by the file's as all first values are. What
            // matters is whether the way changed the base.
            Some(Value::Bool(_)) => drop(known.remove("init_lora_weights")),
            Some(value) if serde_json::from_value::<InitLoraWeights>(value.clone()).is_err() => {
                let key = "init_lora_weights".to_string();
                return Err(AdapterError::Unsupported { path: path.clone(), key, value: value.to_string() });
            }
            _ => {}
        }
        let mut known: Self =
            serde_json::from_value(Value::Object(known)).map_err(|error| wrong(error.to_string()))?;
        known.lora.ensure_weight_tying = Some(known.lora.ensure_weight_tying.unwrap_or(false));
        known.lora.check().map_err(wrong)?;
        if let Some(reason) = known.lora.init_lora_weights.lost_base() {
            let value = json!(known.lora.init_lora_weights).to_string();
            return Err(AdapterError::ChangedBase { path: path.clone(), value, reason });
        }
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
        let mut map = inert_keys();
        map.append(&mut neutral_keys());
        if let Ok(Value::Object(mut known)) = serde_json::to_value(self) {
            // Lists of names are sets to PEFT.
            for key in ["target_modules", "exclude_modules"] {
                if let Some(Value::Array(names)) = known.get_mut(key) {
                    names.sort_by(|a, b| a.as_str().cmp(&b.as_str()));
                }
            }
            map.append(&mut known);
        }
        if self.lora.modules_to_save().is_empty() {
            map.insert("modules_to_save".to_string(), Value::Null);
        }
        map.insert("ensure_weight_tying".to_string(), json!(self.lora.ensure_weight_tying.unwrap_or(false)));
        map.insert("peft_type".to_string(), json!("LORA"));
        map.insert("peft_version".to_string(), json!(PEFT_VERSION));
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
