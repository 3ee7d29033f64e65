//! The recipe: its schema, its defaults, and how a file becomes one.

mod aliases;
mod checkpointing;
mod evaluation;
mod schema;

pub use checkpointing::Checkpointing;
pub use schema::{OptimizerBlock, Recipe};

use crate::error::CliError;
use peft_core::checkpoint::read_bounded;
use peft_core::strict;
use serde_json::{Map, Value};
use std::path::Path;

/// Bytes of the largest recipe read.
const MAX_RECIPE_BYTES: u64 = 1 << 20;

/// Parts of the deepest key that an override may name.
const MAX_DEPTH: usize = 16;

/// Reads a recipe, applies `overrides` (`key=value`, dots for nesting) and resolves every default.
///
/// # Errors
/// Anything wrong with the file, naming key and nearest known key.
pub fn read(path: &Path, overrides: &[String]) -> Result<Recipe, CliError> {
    let recipe = value(path, overrides)?;
    if recipe.get("compare").is_some() {
        let message =
            "`compare` is a key for `peft compare`, which runs several methods; here stands one `method`";
        return Err(CliError::Recipe { path: path.to_path_buf(), message: message.to_string() });
    }
    resolve(recipe).map_err(|message| CliError::Recipe { path: path.to_path_buf(), message })
}

/// Reads a file of keys and values and applies `overrides`.
///
/// # Errors
/// A file that is no such, and overrides that fit nowhere.
pub fn value(path: &Path, overrides: &[String]) -> Result<Value, CliError> {
    let wrong = |message: String| CliError::Recipe { path: path.to_path_buf(), message };
    let text = String::from_utf8(read_bounded(path, MAX_RECIPE_BYTES)?)
        .map_err(|error| wrong(format!("not UTF-8 text: {error}")))?;
    let mut value: Value = serde_saphyr::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    if !value.is_object() {
        return Err(wrong("expected keys and values at the top".to_string()));
    }
    for entry in overrides {
        let (key, text) = entry
            .split_once('=')
            .ok_or_else(|| CliError::flag("--override", format!("`{entry}` is not KEY=VALUE")))?;
        let new: Value = serde_saphyr::from_str(text).unwrap_or_else(|_| Value::String(text.to_string()));
        set(&mut value, key, new).map_err(|message| CliError::flag("--override", message))?;
    }
    Ok(value)
}

/// The recipe of these keys and values, with every default.
///
/// # Errors
/// A message that names the key and the nearest known one.
pub fn resolve(mut value: Value) -> Result<Recipe, String> {
    aliases::rename(&mut value)?;
    let recipe: Recipe = strict::parse(&value)?;
    recipe.check()?;
    Ok(recipe)
}

/// Sets the value at a dotted key, making objects on the way.
fn set(target: &mut Value, key: &str, new: Value) -> Result<(), String> {
    if key.split('.').count() > MAX_DEPTH {
        return Err(format!("a key has at most {MAX_DEPTH} parts"));
    }
    let mut place = target;
    for part in key.split('.') {
        if place.is_null() {
            *place = Value::Object(Map::new());
        }
        place = match place {
            Value::Object(map) => map.entry(part.to_string()).or_insert(Value::Null),
            Value::Array(items) => {
                let length = items.len();
                let item = part.parse::<usize>().ok().and_then(|index| items.get_mut(index));
                item.ok_or_else(|| format!("`{key}`: `{part}` is no place in a list of {length}"))?
            }
            _ => return Err(format!("`{key}`: `{part}` lies inside a value that has no keys")),
        };
    }
    *place = new;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    #[test]
    fn overrides_reach_into_objects_and_lists() {
        let mut value = json!({"method": {"r": 8}, "datasets": [{"path": "a"}]});
        set(&mut value, "method.r", json!(4)).unwrap();
        set(&mut value, "datasets.0.path", json!("b")).unwrap();
        set(&mut value, "optimizer.eps", json!(1e-6)).unwrap();
        assert_eq!(
            value,
            json!({"method": {"r": 4}, "datasets": [{"path": "b"}], "optimizer": {"eps": 1e-6}})
        );
        assert!(set(&mut value, "datasets.1.path", json!("c")).is_err());
        assert!(set(&mut value, "method.r.x", json!(1)).is_err());
    }
}
