//! What a recipe says about one data file.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The form of a file's records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DatasetType {
    /// `instruction`, optional `input`, and `output`, written with the Alpaca prompt.
    Alpaca,
    /// `prompt` and `completion`, joined with nothing between.
    PromptCompletion,
    /// A conversation, written with the tokenizer's chat template.
    Messages,
    /// Plain `text`, all of it learnt.
    Completion,
}

/// The names of a message's two properties.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MessageProperties {
    /// Who speaks; `role` unless said otherwise.
    pub role: String,
    /// What is said; `content` unless said otherwise.
    pub content: String,
}

impl Default for MessageProperties {
    fn default() -> Self {
        Self { role: "role".into(), content: "content".into() }
    }
}

/// One entry of a recipe's `datasets`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatasetConfig {
    /// A `.json`, `.jsonl`, `.csv`, `.tsv`, `.parquet` or `.txt` file.
    pub path: PathBuf,
    /// The form of its records.
    #[serde(rename = "type")]
    pub format: DatasetType,
    /// In a `.txt` file, what stands between two texts, for example `<|endoftext|>`; without it each line is one.
    pub separator: Option<String>,
    /// Use the first so many records.
    pub limit: Option<usize>,
    /// The field to take for `instruction`.
    pub field_instruction: Option<String>,
    /// The field to take for `input`.
    pub field_input: Option<String>,
    /// The field to take for `output`.
    pub field_output: Option<String>,
    /// The field to take for `prompt`.
    pub field_prompt: Option<String>,
    /// The field to take for `completion`.
    pub field_completion: Option<String>,
    /// The field to take for `messages`; without it `messages`, or `conversations` where that is absent.
    pub field_messages: Option<String>,
    /// The field to take for `text`.
    pub field_text: Option<String>,
    /// The names of a message's properties; without it `role` and `content`, or `from` and `value` where those are
    /// absent.
    pub message_property_mappings: Option<MessageProperties>,
}

impl DatasetConfig {
    /// A file whose fields have their usual names.
    pub fn new(path: impl Into<PathBuf>, format: DatasetType) -> Self {
        Self {
            path: path.into(),
            format,
            separator: None,
            limit: None,
            field_instruction: None,
            field_input: None,
            field_output: None,
            field_prompt: None,
            field_completion: None,
            field_messages: None,
            field_text: None,
            message_property_mappings: None,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    #[test]
    fn the_smallest_entry_is_read_and_written_back() {
        let entry = json!({"path": "a.jsonl", "type": "prompt_completion"});
        let config: DatasetConfig = serde_json::from_value(entry.clone()).unwrap();
        assert_eq!(config, DatasetConfig::new("a.jsonl", DatasetType::PromptCompletion));
        let mut written = serde_json::to_value(config).unwrap();
        written.as_object_mut().unwrap().retain(|_, value| !value.is_null());
        assert_eq!(written, entry);
    }

    #[test]
    fn an_unknown_type_is_refused() {
        let entry = json!({"path": "a", "type": "alpacca"});
        assert!(serde_json::from_value::<DatasetConfig>(entry).is_err());
    }
}
