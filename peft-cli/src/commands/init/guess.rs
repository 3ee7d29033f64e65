//! What data is, from the fields of its first records.

use crate::error::CliError;
use peft_core::data::records::{Record, read};
use peft_core::data::{DatasetConfig, DatasetType};
use std::path::Path;

/// Records looked at.
const RECORDS: usize = 16;

/// Pairs that stand for prompt and completion, most usual first.
const PAIRS: [(&str, &str); 9] = [
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "output"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("input", "output"),
    ("input", "target"),
];

/// The dataset that the file's first records look like, with the names of its fields where they are not the usual ones.
///
/// # Errors
/// The file cannot be read, or its fields fit no type.
pub fn dataset(path: &Path) -> Result<DatasetConfig, CliError> {
    let mut config = DatasetConfig::new(path, DatasetType::Completion);
    config.limit = Some(RECORDS);
    let records = read(&config)?;
    config.limit = None;
    if fit(&records, &mut config) {
        return Ok(config);
    }
    let mut fields: Vec<&str> = records.iter().flat_map(|record| record.keys()).map(String::as_str).collect();
    fields.sort_unstable();
    fields.dedup();
    let message = format!(
        "{}: the fields {} are those of no type; expected instruction and output (alpaca), prompt and completion \
         (prompt_completion), messages, or text (completion)",
        path.display(),
        fields.join(", ")
    );
    Err(CliError::flag("--data", message))
}

/// Sets type and names to what fits all records.
fn fit(records: &[Record], config: &mut DatasetConfig) -> bool {
    let all = |name: &str, is: fn(&serde_json::Value) -> bool| {
        records.iter().all(|record| record.get(name).is_some_and(is))
    };
    let text = |name: &str| all(name, |value| value.is_string() || value.is_number());
    let list = |name: &str| all(name, serde_json::Value::is_array);
    if list("messages") || list("conversations") {
        config.format = DatasetType::Messages;
        return true;
    }
    if text("instruction") && (text("output") || text("response")) {
        config.format = DatasetType::Alpaca;
        config.field_output = (!text("output")).then(|| "response".to_string());
        return true;
    }
    if let Some((prompt, completion)) =
        PAIRS.iter().find(|(prompt, completion)| text(prompt) && text(completion))
    {
        config.format = DatasetType::PromptCompletion;
        config.field_prompt = (*prompt != "prompt").then(|| prompt.to_string());
        config.field_completion = (*completion != "completion").then(|| completion.to_string());
        return true;
    }
    config.format = DatasetType::Completion;
    text("text")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn guess(lines: &str) -> Result<DatasetConfig, CliError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.jsonl");
        std::fs::write(&path, lines).unwrap();
        dataset(&path)
    }

    #[test]
    fn the_fields_tell_the_type() {
        let kind = |lines: &str| guess(lines).unwrap().format;
        assert_eq!(kind(r#"{"instruction": "i", "input": "", "output": "o"}"#), DatasetType::Alpaca);
        assert_eq!(kind(r#"{"prompt": "p", "completion": 3}"#), DatasetType::PromptCompletion);
        assert_eq!(kind(r#"{"conversations": [], "text": "t"}"#), DatasetType::Messages);
        assert_eq!(kind("{\"text\": \"t\"}\n{\"text\": \"u\"}"), DatasetType::Completion);
    }

    #[test]
    fn other_names_are_written_out() {
        let found = guess(r#"{"question": "q", "answer": "a"}"#).unwrap();
        assert_eq!(found.format, DatasetType::PromptCompletion);
        assert_eq!(found.field_prompt.as_deref(), Some("question"));
        assert_eq!(found.field_completion.as_deref(), Some("answer"));
        assert_eq!(
            guess(r#"{"instruction": "i", "response": "r"}"#).unwrap().field_output.as_deref(),
            Some("response")
        );
    }

    #[test]
    fn what_fits_nothing_is_named() {
        let error = guess("{\"text\": \"t\"}\n{\"label\": 1}").unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("the fields label, text are those of no type"), "{error}");
    }
}
