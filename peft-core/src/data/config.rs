//! What a recipe says about one data file.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

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

/// Which of the tokens that end a message are learnt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainOnEos {
    /// Those of the messages that are learnt.
    #[default]
    Turn,
    /// Those of all messages.
    All,
    /// The one of the last message that is learnt.
    Last,
}

/// One entry of a recipe's `datasets`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
    /// The field to take for `tools`, the list of functions that a conversation may call; a list or its JSON text.
    pub field_tools: Option<String>,
    /// Whose messages are learnt; `[assistant]` unless said otherwise.
    pub roles_to_train: Option<Vec<String>>,
    /// The property of a message that says whether it is learnt, whoever speaks. Without it, `train` (true or false)
    /// and `weight` (0 or 1) where a message has them.
    pub message_field_training: Option<String>,
    /// Which of the tokens that end a message are learnt; `turn` unless said otherwise.
    pub train_on_eos: Option<TrainOnEos>,
    /// Further variables of the chat template, for example `enable_thinking: false`; they win over the recipe's.
    pub chat_template_kwargs: Option<Map<String, Value>>,
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
            field_tools: None,
            roles_to_train: None,
            message_field_training: None,
            train_on_eos: None,
            chat_template_kwargs: None,
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
