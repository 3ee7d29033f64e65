//! A record's fields as prompts need them.

use std::borrow::Cow;
use std::path::Path;

use serde_json::{Map, Value};

use super::records::Record;
use super::{DataError, DatasetConfig, MessageProperties};
use crate::nearest::did_you_mean;

/// A record's fields, with what an error has to say about them.
pub(super) struct Fields<'a> {
    /// The file.
    pub(super) path: &'a Path,
    /// The record.
    pub(super) record: &'a Record,
    /// Its number, from 1.
    pub(super) number: usize,
}

/// A message of a conversation.
pub(super) struct Message {
    /// What the chat template sees, with `role` and `content`.
    pub(super) value: Value,
    /// Whether it is learnt, where the record says so.
    pub(super) train: Option<bool>,
}

impl Fields<'_> {
    fn get(&self, name: &str) -> Result<&Value, DataError> {
        self.record.get(name).ok_or_else(|| self.missing(self.record, "", name))
    }

    /// The error for `object`, which stands at `place` in the record and lacks `name`.
    fn missing(&self, object: &Record, place: &str, name: &str) -> DataError {
        let found: Vec<&str> = object.keys().map(String::as_str).collect();
        DataError::MissingField {
            path: self.path.into(),
            record: self.number,
            field: format!("{place}{name}"),
            hint: did_you_mean(name, found.iter().copied()),
            found: found.join(", "),
        }
    }

    fn wrong(&self, name: impl Into<String>, expected: &'static str, found: &Value) -> DataError {
        let mut found = found.to_string();
        if let Some((end, _)) = found.char_indices().nth(60) {
            found.truncate(end);
            found.push('…');
        }
        let (path, record) = (self.path.into(), self.number);
        DataError::WrongField { path, record, field: name.into(), expected, found }
    }

    /// A field's text; numbers count as their digits, for labels.
    pub(super) fn text(&self, name: &str) -> Result<Cow<'_, str>, DataError> {
        match self.get(name)? {
            Value::String(text) => Ok(Cow::Borrowed(text)),
            Value::Number(number) => Ok(Cow::Owned(number.to_string())),
            other => Err(self.wrong(name, "text", other)),
        }
    }

    /// A field that may be missing, null or empty; but one that the configuration names must be there.
    pub(super) fn optional_text(&self, usual: &str, named: Option<&str>) -> Result<Cow<'_, str>, DataError> {
        let name = named.unwrap_or(usual);
        match self.record.get(name) {
            None if named.is_none() => Ok(Cow::Borrowed("")),
            Some(Value::Null) => Ok(Cow::Borrowed("")),
            _ => self.text(name),
        }
    }

    /// The functions that the conversation may call.
    pub(super) fn tools(&self, config: &DatasetConfig) -> Result<Option<Value>, DataError> {
        let name = config.field_tools.as_deref().unwrap_or("tools");
        let value = match self.record.get(name) {
            None if config.field_tools.is_none() => return Ok(None),
            _ => self.get(name)?,
        };
        let expected = "a list of functions";
        // Tables keep nested values as JSON.
        let tools = match value.as_str() {
            Some("") => Value::Null,
            Some(text) => serde_json::from_str(text).map_err(|_| self.wrong(name, expected, value))?,
            None => value.clone(),
        };
        match tools {
            Value::Null => Ok(None),
            Value::Array(list) if list.iter().all(Value::is_object) => Ok(Some(Value::Array(list))),
            _ => Err(self.wrong(name, expected, value)),
        }
    }

    /// The messages as objects with `role` and `content`.
    pub(super) fn messages(&self, config: &DatasetConfig) -> Result<Vec<Message>, DataError> {
        let name = match &config.field_messages {
            Some(name) => name.as_str(),
            None if !self.record.contains_key("messages") && self.record.contains_key("conversations") => {
                "conversations"
            }
            None => "messages",
        };
        let value = self.get(name)?;
        match value.as_array() {
            Some(messages) if !messages.is_empty() => {
                let message = |(at, message)| self.message(config, name, at, message);
                messages.iter().enumerate().map(message).collect()
            }
            _ => Err(self.wrong(name, "a list of messages that is not empty", value)),
        }
    }

    fn message(
        &self,
        config: &DatasetConfig,
        name: &str,
        at: usize,
        value: &Value,
    ) -> Result<Message, DataError> {
        let place = format!("{name}[{at}]");
        let Some(message) = value.as_object() else {
            return Err(self.wrong(place, "an object", value));
        };
        let usual = MessageProperties::default();
        let keys = match &config.message_property_mappings {
            Some(keys) => Cow::Borrowed(keys),
            None if !message.contains_key("role") && message.contains_key("from") => {
                Cow::Owned(MessageProperties { role: "from".into(), content: "value".into() })
            }
            None => Cow::Borrowed(&usual),
        };
        let required = |key: &str| {
            message.get(key).cloned().ok_or_else(|| self.missing(message, &format!("{place}."), key))
        };
        let role = match required(&keys.role)? {
            Value::String(role) => match role.as_str() {
                "human" => "user".to_string(),
                "gpt" => "assistant".to_string(),
                _ => role,
            },
            other => return Err(self.wrong(format!("{place}.{}", keys.role), "a role's name", &other)),
        };
        // A message that only calls tools may say nothing.
        let content = match message.contains_key("tool_calls") && !message.contains_key(&keys.content) {
            true => Value::Null,
            false => required(&keys.content)?,
        };
        if !(content.is_string() || content.is_array() || content.is_null()) {
            return Err(self.wrong(format!("{place}.{}", keys.content), "text or a list of parts", &content));
        }
        let mut normal = Map::from_iter([("role".into(), role.into()), ("content".into(), content)]);
        let others = message.iter().filter(|(key, _)| **key != keys.role && **key != keys.content);
        normal.extend(others.map(|(key, value)| (key.clone(), value.clone())));
        let flags = match &config.message_field_training {
            Some(name) => vec![name.as_str()],
            None => vec!["train", "weight"],
        };
        let mut train = None;
        for name in flags {
            train = match normal.remove(name) {
                None | Some(Value::Null) => train,
                Some(Value::Bool(flag)) => Some(flag),
                Some(Value::Number(number)) if number.as_f64() == Some(0.0) => Some(false),
                Some(Value::Number(number)) if number.as_f64() == Some(1.0) => Some(true),
                Some(other) => {
                    return Err(self.wrong(format!("{place}.{name}"), "true, false, 0 or 1", &other));
                }
            };
        }
        Ok(Message { value: Value::Object(normal), train })
    }
}
