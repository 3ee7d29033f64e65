//! Deserialising without forgiving: a key that the schema does not know is an error with the nearest known one.
//!
//! The schema is asked by example: what was parsed is serialised again, and every key of the input must have come back.

use crate::nearest::did_you_mean;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

/// Parses a value as `T`.
///
/// # Errors
/// A message that names the key.
pub fn parse<T: DeserializeOwned + Serialize>(value: &Value) -> Result<T, String> {
    let parsed: T = serde_path_to_error::deserialize(value.clone()).map_err(|error| {
        let path = error.path().to_string();
        if path == "." { error.inner().to_string() } else { format!("`{path}`: {}", error.inner()) }
    })?;
    let known = serde_json::to_value(&parsed).map_err(|error| error.to_string())?;
    refuse_unknown(value, &known, "")?;
    Ok(parsed)
}

fn refuse_unknown(input: &Value, known: &Value, path: &str) -> Result<(), String> {
    match (input, known) {
        (Value::Object(input), Value::Object(known)) => {
            for (key, value) in input {
                let here = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                let Some(known_value) = known.get(key) else {
                    let keys: Vec<&str> = known.keys().map(String::as_str).collect();
                    let suggestion = did_you_mean(key, keys.iter().copied());
                    let all = if suggestion.is_empty() {
                        format!("; known: {}", keys.join(", "))
                    } else {
                        suggestion
                    };
                    return Err(format!("unknown key `{here}`{all}"));
                };
                refuse_unknown(value, known_value, &here)?;
            }
            Ok(())
        }
        (Value::Array(input), Value::Array(known)) => {
            let mut pairs = input.iter().zip(known).enumerate();
            pairs.try_for_each(|(i, (input, known))| refuse_unknown(input, known, &format!("{path}[{i}]")))
        }
        _ => Ok(()),
    }
}
