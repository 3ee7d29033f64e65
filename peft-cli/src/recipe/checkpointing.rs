//! `gradient_checkpointing`: what the backward computes again, or that it is to be chosen.

use peft_core::train::GradientCheckpointing;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fmt;

/// The key's values.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Value")]
pub enum Checkpointing {
    /// The fastest that fits into memory.
    #[default]
    Auto,
    /// `false`, `selective` or `true`.
    Mode(GradientCheckpointing),
}

impl Checkpointing {
    /// The way to run that is asked for; until one is chosen, that of the least memory.
    pub fn mode(self) -> GradientCheckpointing {
        match self {
            Checkpointing::Auto => GradientCheckpointing::Layers,
            Checkpointing::Mode(mode) => mode,
        }
    }
}

impl fmt::Display for Checkpointing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Checkpointing::Auto => "auto",
            Checkpointing::Mode(GradientCheckpointing::Off) => "false",
            Checkpointing::Mode(GradientCheckpointing::Selective) => "selective",
            Checkpointing::Mode(GradientCheckpointing::Layers) => "true",
        })
    }
}

impl Serialize for Checkpointing {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Checkpointing::Mode(GradientCheckpointing::Off) => serializer.serialize_bool(false),
            Checkpointing::Mode(GradientCheckpointing::Layers) => serializer.serialize_bool(true),
            named => serializer.collect_str(named),
        }
    }
}

impl TryFrom<Value> for Checkpointing {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        match &value {
            Value::Bool(false) => Ok(Checkpointing::Mode(GradientCheckpointing::Off)),
            Value::Bool(true) => Ok(Checkpointing::Mode(GradientCheckpointing::Layers)),
            Value::String(name) if name == "selective" => {
                Ok(Checkpointing::Mode(GradientCheckpointing::Selective))
            }
            Value::String(name) if name == "auto" => Ok(Checkpointing::Auto),
            other => Err(format!("{other}, expected auto, false, selective or true")),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    #[test]
    fn booleans_and_names_come_back_as_they_went() {
        for value in [json!(false), json!(true), json!("selective"), json!("auto")] {
            let parsed: Checkpointing = serde_json::from_value(value.clone()).unwrap();
            assert_eq!(json!(parsed), value);
        }
        for value in [json!("yes"), json!("true"), json!(1), json!(null)] {
            let error = serde_json::from_value::<Checkpointing>(value.clone()).unwrap_err().to_string();
            assert!(error.contains(&value.to_string()) && error.contains("selective"), "{error}");
        }
    }
}
