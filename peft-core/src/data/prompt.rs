//! A record as one text, with the characters that the model should learn to write.

use std::ops::Range;

use serde_json::{Map, Value};

use super::fields::Fields;
use super::records::Record;
use super::{DataError, DatasetConfig, DatasetType};
use crate::text::{ChatTemplate, Tokenizer};

/// The prompt of Stanford Alpaca for a record with an input.
const ALPACA_WITH_INPUT: [&str; 3] = [
    "Below is an instruction that describes a task, paired with an input that provides further context. \
     Write a response that appropriately completes the request.\n\n### Instruction:\n",
    "\n\n### Input:\n",
    "\n\n### Response:",
];
/// The prompt of Stanford Alpaca for a record without one.
const ALPACA_WITHOUT_INPUT: [&str; 2] = [
    "Below is an instruction that describes a task. \
     Write a response that appropriately completes the request.\n\n### Instruction:\n",
    "\n\n### Response:",
];

/// The text of one example.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// The whole text, prompt and answers.
    pub text: String,
    /// The characters to learn, as ascending ranges of character positions.
    pub supervised: Vec<Range<usize>>,
    /// Whether the text ends with what the model should write but not with a token that says so, so that it should learn
    /// to stop there.
    pub ends_with_answer: bool,
}

/// Writes the records of one file.
#[derive(Debug)]
pub struct Prompter<'a> {
    pub(super) config: &'a DatasetConfig,
    template: Option<&'a ChatTemplate>,
    /// Further variables of the template.
    pub(super) variables: Map<String, Value>,
    /// Texts of the tokens that end a turn.
    pub(super) stops: Vec<String>,
}

impl<'a> Prompter<'a> {
    /// A prompter for the file of `config`; `template` and its `variables` are needed for type `messages` alone.
    pub fn new(
        config: &'a DatasetConfig,
        template: Option<&'a ChatTemplate>,
        tokenizer: &Tokenizer,
        variables: &Map<String, Value>,
    ) -> Self {
        let stops = tokenizer.stop_ids().iter().filter_map(|&id| tokenizer.token(id)).collect();
        let mut variables = variables.clone();
        variables.extend(config.chat_template_kwargs.clone().unwrap_or_default());
        Self { config, template, variables, stops }
    }

    /// Writes one record; `number` counts from 1 and serves errors.
    ///
    /// # Errors
    /// When a field is missing or of the wrong kind, and when the chat template is missing, fails, or does not show
    /// what the assistant said.
    pub fn prompt(&self, record: &Record, number: usize) -> Result<Prompt, DataError> {
        let config = self.config;
        let fields = Fields { path: &config.path, record, number };
        let named = |name: &'a Option<String>, usual: &'static str| name.as_deref().unwrap_or(usual);
        match config.format {
            DatasetType::Alpaca => {
                let instruction = fields.text(named(&config.field_instruction, "instruction"))?;
                let input = fields.optional_text("input", config.field_input.as_deref())?;
                let output = fields.text(named(&config.field_output, "output"))?;
                let prompt = match &*input {
                    "" => [ALPACA_WITHOUT_INPUT[0], &instruction, ALPACA_WITHOUT_INPUT[1]].concat(),
                    input => {
                        let [opening, before_input, before_answer] = ALPACA_WITH_INPUT;
                        [opening, &instruction, before_input, input, before_answer].concat()
                    }
                };
                Ok(answered(prompt, &output))
            }
            DatasetType::PromptCompletion => {
                let prompt = fields.text(named(&config.field_prompt, "prompt"))?;
                let completion = fields.text(named(&config.field_completion, "completion"))?;
                Ok(answered(prompt.into_owned(), &completion))
            }
            DatasetType::Completion => {
                let text = fields.text(named(&config.field_text, "text"))?;
                Ok(answered(String::new(), &text))
            }
            DatasetType::Messages => {
                let template = self.template.ok_or_else(|| {
                    DataError::Option("records of type `messages` need a chat template".into())
                })?;
                self.conversation(template, &fields)
            }
        }
    }
}

fn answered(prompt: String, answer: &str) -> Prompt {
    let start = prompt.chars().count();
    let supervised = Vec::from_iter((!answer.is_empty()).then(|| start..start + answer.chars().count()));
    Prompt { text: prompt + answer, supervised, ends_with_answer: true }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used, clippy::single_range_in_vec_init)]
    use super::*;
    use crate::text::fixtures::plain;
    use serde_json::json;

    pub(in crate::data) fn prompt(
        config: &DatasetConfig,
        tokenizer: &Tokenizer,
        record: Value,
    ) -> Result<Prompt, DataError> {
        let template = tokenizer.chat_template().ok();
        let Value::Object(record) = record else { panic!("not an object") };
        Prompter::new(config, template.as_ref(), tokenizer, &Map::new()).prompt(&record, 7)
    }

    fn usual(format: DatasetType, record: Value) -> Prompt {
        prompt(&DatasetConfig::new("d.json", format), &plain(), record).unwrap()
    }

    #[test]
    fn alpaca_with_and_without_input() {
        let record = json!({"instruction": "Add.", "input": "1+1", "output": "2"});
        let text = "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1+1\n\n### Response:2";
        let expected = Prompt {
            supervised: vec![text.len() - 1..text.len()],
            text: text.into(),
            ends_with_answer: true,
        };
        assert_eq!(usual(DatasetType::Alpaca, record), expected);
        let text = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Response:2";
        for record in [
            json!({"instruction": "Add.", "input": "", "output": 2}),
            json!({"instruction": "Add.", "input": null, "output": "2"}),
            json!({"instruction": "Add.", "output": "2"}),
        ] {
            assert_eq!(usual(DatasetType::Alpaca, record).text, text);
        }
    }

    #[test]
    fn prompt_and_completion_are_joined_with_nothing() {
        let prompt = usual(DatasetType::PromptCompletion, json!({"prompt": "é:", "completion": "ab"}));
        assert_eq!((prompt.text.as_str(), prompt.supervised), ("é:ab", vec![2..4]));
        let prompt = usual(DatasetType::Completion, json!({"text": "été"}));
        assert_eq!((prompt.text.as_str(), prompt.supervised), ("été", vec![0..3]));
    }

    #[test]
    fn missing_and_wrong_fields_are_named() {
        let mut config = DatasetConfig::new("d.json", DatasetType::PromptCompletion);
        let failure =
            |config: &DatasetConfig, record| prompt(config, &plain(), record).unwrap_err().to_string();
        assert_eq!(
            failure(&config, json!({"prompt": "a", "complection": "b"})),
            "d.json: record 7 has no field `completion` (did you mean `complection`?); its fields are: prompt, complection"
        );
        assert_eq!(
            failure(&config, json!({"prompt": ["a"], "completion": "b"})),
            "d.json: record 7, field `prompt`: expected text, found [\"a\"]"
        );
        config.field_prompt = Some("question".into());
        assert!(failure(&config, json!({"prompt": "a"})).contains("no field `question`"));
        let mut config = DatasetConfig::new("d.json", DatasetType::Alpaca);
        config.field_input = Some("context".into());
        assert!(failure(&config, json!({"instruction": "a", "output": "b"})).contains("no field `context`"));
    }
}
