//! Data files named on the command line.

use crate::args::DataArgs;
use crate::error::CliError;
use peft_core::data::{DatasetConfig, LoadOptions};
use std::path::Path;

/// The dataset that the flags describe.
pub fn config(path: &Path, args: &DataArgs) -> Result<DatasetConfig, CliError> {
    let mut map = serde_json::Map::new();
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
    crate::recipe::parse_strict(&map.into()).map_err(|message| CliError::flag("--data", message))
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
        chat_template: None,
        now: None,
    })
}
