//! The files of a model folder that say how text is treated.

use std::path::Path;

use serde_json::{Map, Value};

use super::TextError;
use crate::checkpoint::{CheckpointError, Fence, read_bounded};

/// Largest `tokenizer.json` accepted; the largest published ones are some 30 MB.
pub(super) const MAX_TOKENIZER_BYTES: u64 = 512 << 20;
/// Largest configuration or template file accepted.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// A file's bytes; `None` when there is no such file. A link must stay in the folder or its hub cache.
pub(super) fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, TextError> {
    let inside = match path.parent().filter(|_| path.exists()) {
        Some(dir) => Fence::around(dir).and_then(|fence| fence.check(path)),
        None => Ok(()),
    };
    match inside.and_then(|()| read_bounded(path, limit)) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(CheckpointError::ReadFailed { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            Ok(None)
        }
        Err(CheckpointError::ReadFailed { path, source }) => Err(TextError::Read { path, source }),
        Err(CheckpointError::TooLarge { path, bytes, limit }) => {
            Err(TextError::TooLarge { path, bytes, limit })
        }
        Err(CheckpointError::LeadsOut { path, target }) => {
            let problem = format!(
                "leads out of its folder, to {}; copy the file instead of linking it",
                target.display()
            );
            Err(TextError::Invalid { path, problem })
        }
        Err(_) => Err(TextError::Invalid { path: path.into(), problem: "not a regular file".into() }),
    }
}

/// A JSON object from a file, empty when there is no such file.
pub(super) fn read_object(path: &Path) -> Result<Map<String, Value>, TextError> {
    let Some(bytes) = read(path, MAX_CONFIG_BYTES)? else {
        return Ok(Map::new());
    };
    serde_json::from_slice(&bytes).map_err(|error| TextError::Invalid {
        path: path.into(),
        problem: format!("not a JSON object: {error}"),
    })
}

/// The text of a special token, written as a string or as an object with `content`.
pub(super) fn special_token(
    path: &Path,
    object: &Map<String, Value>,
    role: &str,
) -> Result<Option<String>, TextError> {
    match object.get(role) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(Value::Object(token)) if token.get("content").is_some_and(Value::is_string) => {
            Ok(token.get("content").and_then(Value::as_str).map(String::from))
        }
        Some(other) => Err(wrong_kind(path, role, "a string or an object with `content`", other)),
    }
}

/// A value that is true, false or absent.
pub(super) fn flag(path: &Path, object: &Map<String, Value>, key: &str) -> Result<Option<bool>, TextError> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(*value)),
        Some(other) => Err(wrong_kind(path, key, "true or false", other)),
    }
}

/// `eos_token_id`, a number or a list of numbers.
pub(super) fn eos_token_ids(path: &Path, object: &Map<String, Value>) -> Result<Vec<u32>, TextError> {
    let Some(value) = object.get("eos_token_id") else {
        return Ok(Vec::new());
    };
    let wrong = || wrong_kind(path, "eos_token_id", "a token id or a list of token ids", value);
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(wrong);
    match value {
        Value::Null => Ok(Vec::new()),
        Value::Array(values) => values.iter().map(id).collect(),
        value => Ok(vec![id(value)?]),
    }
}

/// The chat template's source, and when there is none to choose the names of those there are.
pub(super) fn chat_template(
    dir: &Path,
    config_path: &Path,
    config: &Map<String, Value>,
) -> Result<(Option<String>, Vec<String>), TextError> {
    let path = dir.join("chat_template.jinja");
    if let Some(bytes) = read(&path, MAX_CONFIG_BYTES)? {
        let source = String::from_utf8(bytes)
            .map_err(|error| TextError::Invalid { path, problem: format!("not UTF-8: {error}") })?;
        return Ok((Some(source), Vec::new()));
    }
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok((None, Vec::new())),
        Some(Value::String(source)) => Ok((Some(source.clone()), Vec::new())),
        Some(Value::Array(entries)) => {
            let text = |entry: &Value, key: &str| entry.get(key)?.as_str().map(String::from);
            let named: Option<Vec<_>> =
                entries.iter().map(|entry| Some((text(entry, "name")?, text(entry, "template")?))).collect();
            let named = named.ok_or_else(|| TextError::Invalid {
                path: config_path.into(),
                problem: "`chat_template` is a list, but not of objects with `name` and `template`".into(),
            })?;
            if let Some((_, source)) = named.iter().find(|(name, _)| name == "default" || named.len() == 1) {
                return Ok((Some(source.clone()), Vec::new()));
            }
            Ok((None, named.into_iter().map(|(name, _)| name).collect()))
        }
        Some(other) => Err(wrong_kind(config_path, "chat_template", "a string or a list", other)),
    }
}

fn wrong_kind(path: &Path, key: &str, expected: &str, found: &Value) -> TextError {
    TextError::Invalid { path: path.into(), problem: format!("`{key}` should be {expected}, but is {found}") }
}

/// What to do about a folder without `tokenizer.json`.
pub(super) fn without_tokenizer_hint(dir: &Path) -> String {
    if !dir.is_dir() {
        return ", which is not a folder".into();
    }
    let beside = ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt"];
    match beside.iter().find(|name| dir.join(name).exists()) {
        Some(name) => format!(
            "; there is {name}, which needs converting once with Python: AutoTokenizer.from_pretrained(\"{0}\").save_pretrained(\"{0}\")",
            dir.display()
        ),
        None => String::new(),
    }
}
