//! Data files named on the command line.

use crate::args::{ChatArgs, DataArgs};
use crate::error::CliError;
use crate::recipe::Recipe;
use peft_core::data::{DatasetConfig, LoadOptions};
use serde_json::{Map, Value};
use std::path::Path;

/// Largest template file accepted.
const MAX_TEMPLATE_BYTES: u64 = 1 << 20;

/// The dataset that the flags describe.
pub fn config(path: &Path, args: &DataArgs) -> Result<DatasetConfig, CliError> {
    let mut map = Map::new();
    map.insert("path".to_string(), path.display().to_string().into());
    map.insert("type".to_string(), args.kind.clone().into());
    if let Some(separator) = &args.separator {
        map.insert("separator".to_string(), separator.clone().into());
    }
    if let Some(limit) = args.limit {
        map.insert("limit".to_string(), limit.into());
    }
    for field in &args.fields {
        let (field, name) = field
            .split_once('=')
            .ok_or_else(|| CliError::flag("--field", format!("`{field}` is not FIELD=NAME")))?;
        map.insert(format!("field_{}", field.trim_start_matches("field_")), name.into());
    }
    for entry in &args.keys {
        let (key, text) = entry
            .split_once('=')
            .ok_or_else(|| CliError::flag("--dataset", format!("`{entry}` is not KEY=VALUE")))?;
        let value = serde_saphyr::from_str(text).unwrap_or_else(|_| text.into());
        map.insert(key.to_string(), value);
    }
    peft_core::strict::parse(&map.into()).map_err(|message| CliError::flag("--data", message))
}

/// How its records become examples.
pub fn options(args: &DataArgs) -> Result<LoadOptions, CliError> {
    let on_truncation = args
        .on_truncation
        .as_ref()
        .map(|name| serde_json::from_value(name.clone().into()))
        .transpose()
        .map_err(|error| CliError::flag("--on-truncation", error))?;
    Ok(LoadOptions {
        sequence_len: args.sequence_len,
        train_on_inputs: args.train_on_inputs,
        on_truncation,
        chat_template: args.chat.chat_template.as_deref().map(chat_template).transpose()?,
        chat_template_kwargs: chat_template_kwargs(&args.chat)?,
        now: None,
    })
}

/// How a recipe's data become examples. `now` is what templates that write the date are told.
pub fn recipe_options(recipe: &Recipe, now: Option<u64>) -> Result<LoadOptions, CliError> {
    Ok(LoadOptions {
        sequence_len: recipe.sequence_len,
        train_on_inputs: recipe.train_on_inputs,
        on_truncation: recipe.on_truncation,
        chat_template: recipe.chat_template.as_deref().map(chat_template).transpose()?,
        chat_template_kwargs: recipe.chat_template_kwargs.clone(),
        now,
    })
}

/// The source of a chat template that is given by its file or by itself.
pub fn chat_template(value: &str) -> Result<String, CliError> {
    // Without either of these a template would write the same whatever was said.
    if value.contains("{{") || value.contains("{%") {
        return Ok(value.to_string());
    }
    let unusable = |problem: String| {
        let message = format!("`{value}` is neither a template's text nor a file with one: {problem}");
        CliError::flag("chat_template", message)
    };
    let size = std::fs::metadata(value).map_err(|error| unusable(error.to_string()))?.len();
    if size > MAX_TEMPLATE_BYTES {
        return Err(unusable(format!("it has {size} bytes, more than {MAX_TEMPLATE_BYTES}")));
    }
    std::fs::read_to_string(value).map_err(|error| unusable(error.to_string()))
}

/// The variables that the flag names.
pub fn chat_template_kwargs(args: &ChatArgs) -> Result<Map<String, Value>, CliError> {
    let parse = |text: &String| {
        serde_saphyr::from_str(text).map_err(|error| CliError::flag("--chat-template-kwargs", error))
    };
    Ok(args.chat_template_kwargs.as_ref().map(parse).transpose()?.unwrap_or_default())
}
