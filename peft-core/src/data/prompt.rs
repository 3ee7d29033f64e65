//! A record as one text, with the characters that the model should learn to write.

use std::ops::Range;

use serde_json::{Map, Value};

use super::fields::Fields;
use super::records::Record;
use super::{DataError, DatasetConfig, DatasetType};
use crate::text::{ChatTemplate, TextError, Tokenizer};

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
    /// Whether the text ends with what the model should write, so that it should learn to stop there.
    pub ends_with_answer: bool,
}

/// Writes the records of one file.
#[derive(Debug)]
pub struct Prompter<'a> {
    config: &'a DatasetConfig,
    template: Option<&'a ChatTemplate>,
    /// Texts of the tokens that end a turn.
    stops: Vec<String>,
}

impl<'a> Prompter<'a> {
    /// A prompter for the file of `config`; `template` is needed for type `messages` alone.
    pub fn new(config: &'a DatasetConfig, template: Option<&'a ChatTemplate>, tokenizer: &Tokenizer) -> Self {
        let stops = tokenizer.stop_ids().iter().filter_map(|&id| tokenizer.token(id)).collect();
        Self { config, template, stops }
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

    /// Renders the conversation and finds the assistant's turns in it.
    fn conversation(&self, template: &ChatTemplate, fields: &Fields) -> Result<Prompt, DataError> {
        let messages = fields.messages(self.config)?;
        let render = |messages: &[Value], prompt: bool| template.render(messages, prompt, &Map::new());
        let failed = |source: TextError| DataError::Text {
            path: fields.path.into(),
            record: fields.number,
            source: Box::new(source),
        };
        let text = render(&messages, false).map_err(failed)?;
        let assistant = |message: &Value| message.get("role").and_then(Value::as_str) == Some("assistant");
        let mut supervised = Vec::new();
        let mut marked = 0;
        for at in (0..messages.len()).filter(|&at| assistant(&messages[at])) {
            // The turn is what the text gains over the prompt it answers, if the template writes a conversation's
            // beginning alike whatever follows.
            let start = render(&messages[..at], true).ok().filter(|prompt| text.starts_with(prompt.as_str()));
            let end = render(&messages[..=at], false).ok().filter(|turn| text.starts_with(turn.as_str()));
            let mut turn = match (start.as_ref(), end) {
                (Some(start), Some(end)) if start.len() <= end.len() => {
                    start.len()..self.without_space_after_stop(&end)
                }
                _ => {
                    let content = self.locate(&text, &messages, at, &render).ok_or_else(|| {
                        let (path, record) = (fields.path.into(), fields.number);
                        DataError::OpaqueTemplate { path, record, message: at + 1 }
                    })?;
                    match start {
                        Some(start) if start.len() <= content.start => start.len()..content.end,
                        _ => content,
                    }
                }
            };
            turn.start = turn.start.max(marked);
            marked = turn.end.max(marked);
            if !turn.is_empty() {
                supervised.push(turn);
            }
        }
        Ok(Prompt {
            supervised: character_ranges(&text, &supervised),
            ends_with_answer: messages.last().is_some_and(assistant),
            text,
        })
    }

    /// The length of a rendering without the white space that follows its last stop token: nobody generates it.
    fn without_space_after_stop(&self, rendered: &str) -> usize {
        let trimmed = rendered.trim_end();
        match self.stops.iter().any(|stop| trimmed.ends_with(stop.as_str())) {
            true => trimmed.len(),
            false => rendered.len(),
        }
    }

    /// Where `text` has the content of message `at`, together with the stop token after it: what changes when the
    /// content is replaced. `None` when more changes than that.
    fn locate(
        &self,
        text: &str,
        messages: &[Value],
        at: usize,
        render: &impl Fn(&[Value], bool) -> Result<String, TextError>,
    ) -> Option<Range<usize>> {
        const MARK: &str = "\u{e000}\u{e001}\u{e000}";
        let mut marked = messages.to_vec();
        marked[at].as_object_mut()?.insert("content".into(), MARK.into());
        let rendered = render(&marked, false).ok()?;
        let (before, after) = rendered.split_once(MARK)?;
        if after.contains(MARK) || text.len() < before.len() + after.len() {
            return None;
        }
        let content = text.strip_prefix(before)?.strip_suffix(after)?;
        let end = before.len() + content.len();
        let rest = after.trim_start();
        let stop = self.stops.iter().filter(|stop| rest.starts_with(stop.as_str())).map(String::len).max();
        let through_stop = stop.map_or(0, |stop| after.len() - rest.len() + stop);
        Some(before.len()..end + through_stop)
    }
}

fn answered(prompt: String, answer: &str) -> Prompt {
    let start = prompt.chars().count();
    let supervised = Vec::from_iter((!answer.is_empty()).then(|| start..start + answer.chars().count()));
    Prompt { text: prompt + answer, supervised, ends_with_answer: true }
}

/// Ascending byte ranges as character ranges.
fn character_ranges(text: &str, ranges: &[Range<usize>]) -> Vec<Range<usize>> {
    let (mut byte, mut character) = (0, 0);
    let mut advance = |to: usize| {
        character += text[byte..to].chars().count();
        byte = to;
        character
    };
    ranges.iter().map(|range| advance(range.start)..advance(range.end)).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::single_range_in_vec_init)]
    use super::super::MessageProperties;
    use super::*;
    use crate::text::fixtures::{CHATML, chat, plain};
    use serde_json::json;

    fn prompt(config: &DatasetConfig, tokenizer: &Tokenizer, record: Value) -> Result<Prompt, DataError> {
        let template = tokenizer.chat_template().ok();
        let Value::Object(record) = record else { panic!("not an object") };
        Prompter::new(config, template.as_ref(), tokenizer).prompt(&record, 7)
    }

    fn usual(format: DatasetType, record: Value) -> Prompt {
        prompt(&DatasetConfig::new("d.json", format), &plain(), record).unwrap()
    }

    /// The supervised pieces of a conversation's text.
    fn learnt(template: &str, record: Value) -> Result<Vec<String>, DataError> {
        let prompt = prompt(&DatasetConfig::new("d.json", DatasetType::Messages), &chat(template), record)?;
        let text: Vec<char> = prompt.text.chars().collect();
        Ok(prompt.supervised.into_iter().map(|range| text[range].iter().collect()).collect())
    }

    fn talk() -> Value {
        json!({"messages": [
            {"role": "system", "content": "Grüße"}, {"role": "user", "content": "yes"},
            {"role": "assistant", "content": "yes"}, {"role": "user", "content": "ü?"},
            {"role": "assistant", "content": " n "}]})
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

    #[test]
    fn messages_are_learnt_where_the_assistant_speaks() {
        assert_eq!(learnt(CHATML, talk()).unwrap(), ["yes<|im_end|>", " n <|im_end|>"]);
    }

    #[test]
    fn sharegpt_conversations_are_recognised() {
        let record =
            json!({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]});
        assert_eq!(learnt(CHATML, record).unwrap(), ["b<|im_end|>"]);
        let mut config = DatasetConfig::new("d.json", DatasetType::Messages);
        config.field_messages = Some("chat".into());
        config.message_property_mappings =
            Some(MessageProperties { role: "who".into(), content: "what".into() });
        let record = json!({"chat": [{"who": "user", "what": "a"}, {"who": "assistant", "what": "b"}]});
        let prompt = prompt(&config, &chat(CHATML), record).unwrap();
        assert_eq!(prompt.text, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n");
    }

    #[test]
    fn templates_that_write_the_last_turn_differently_are_followed() {
        // As in reasoning models: only the last answer carries an (empty) thought.
        let thinking = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}\
             <think></think>{% endif %}{{ m.content | trim }}<|im_end|>\n{% endfor %}\
             {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
        assert_eq!(learnt(thinking, talk()).unwrap(), ["yes<|im_end|>", "<think></think>n<|im_end|>"]);
        // As in Mistral's: the system message goes into the last question.
        let moving = "{% for m in messages[1:] %}{% if m.role == 'user' %}[INST]{% if not messages[1:][loop.index:] \
             | selectattr('role', 'eq', 'user') | list %}{{ messages[0].content }} {% endif %}{{ m.content }}[/INST]\
             {% else %} {{ m.content | trim }}<|im_end|>{% endif %}{% endfor %}";
        assert_eq!(learnt(moving, talk()).unwrap(), ["yes<|im_end|>", " n<|im_end|>"]);
    }

    #[test]
    fn templates_that_hide_the_answer_are_refused() {
        let counting = "{% for m in messages %}{{ messages | map(attribute='content') | join | length }}{{ m.content }}{% endfor %}";
        let record = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "hello"},
            {"role": "user", "content": "b"}]});
        let error = learnt(counting, record).unwrap_err();
        assert!(matches!(error, DataError::OpaqueTemplate { record: 7, message: 2, .. }), "{error}");
        assert!(error.is_bad_input());
    }

    #[test]
    fn wrong_messages_are_named() {
        let failure =
            |messages: Value| learnt(CHATML, json!({ "messages": messages })).unwrap_err().to_string();
        assert!(failure(json!([])).contains("expected a list of messages"));
        assert!(failure(json!(["a"])).contains("field `messages[0]`: expected an object"));
        assert!(
            failure(json!([{"role": "user", "contnt": "a"}]))
                .contains("no field `messages[0].content` (did you mean `contnt`?)")
        );
        assert!(failure(json!([{"role": 1, "content": "a"}])).contains("a role's name"));
        let refusing = "{{ raise_exception('no system') }}";
        let error = learnt(refusing, talk()).unwrap_err().to_string();
        assert_eq!(error, "d.json: record 7: the chat template refuses these messages: no system");
    }

    #[test]
    fn a_conversation_that_ends_with_a_question_has_no_answer_at_its_end() {
        let record =
            json!({"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]});
        let prompt = prompt(&DatasetConfig::new("d.json", DatasetType::Messages), &chat(CHATML), record);
        let prompt = prompt.unwrap();
        assert!(!prompt.ends_with_answer);
        assert_eq!(prompt.supervised.len(), 1);
    }
}
