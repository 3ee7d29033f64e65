//! A conversation as one text, with the messages that the model should learn.

use std::borrow::Cow;
use std::ops::Range;

use serde_json::Value;

use super::fields::{Fields, Message};
use super::prompt::{Prompt, Prompter};
use super::turns::{Turn, Turns};
use super::{DataError, TrainOnEos};
use crate::text::{ChatTemplate, TextError};

impl Prompter<'_> {
    /// Renders the conversation and marks the messages to learn in it.
    pub(super) fn conversation(&self, template: &ChatTemplate, fields: &Fields) -> Result<Prompt, DataError> {
        let (messages, train): (Vec<Value>, Vec<Option<bool>>) =
            fields.messages(self.config)?.into_iter().map(|Message { value, train }| (value, train)).unzip();
        let mut variables = Cow::Borrowed(&self.variables);
        if let Some(tools) = fields.tools(self.config)? {
            variables.to_mut().insert("tools".into(), tools);
        }
        let (text, marked) = template.render_marked(&messages, &variables).map_err(|source: TextError| {
            DataError::Text { path: fields.path.into(), record: fields.number, source: Box::new(source) }
        })?;
        let turns = Turns::new(template, &variables, &messages, &text, &self.stops);

        let role = |at: usize| messages[at].get("role").and_then(Value::as_str).unwrap_or_default();
        let assistants: Vec<usize> = (0..messages.len()).filter(|&at| role(at) == "assistant").collect();
        let learnt: Vec<usize> =
            (0..messages.len()).filter(|&at| train[at].unwrap_or_else(|| self.trains(role(at)))).collect();
        let opaque = |at: usize, help: &str| DataError::OpaqueTemplate {
            path: fields.path.into(),
            record: fields.number,
            message: at + 1,
            help: help.into(),
        };
        let turn = |at: usize| match (template.marks_generation(), role(at)) {
            (false, "assistant") => turns.answer(at).ok_or_else(|| opaque(at, WRITE_MARKS)),
            (false, _) => turns.content(at).ok_or_else(|| opaque(at, TRAIN_ASSISTANT)),
            (true, "assistant") => match marked.len() == assistants.len() {
                true => Ok(self.marked_turn(&text, &marked[assistants.partition_point(|&other| other < at)])),
                false => Err(opaque(at, MARK_EACH)),
            },
            (true, _) => Err(opaque(at, MARK_ASSISTANT)),
        };
        let mut chosen = match template.marks_generation() && learnt == assistants {
            true => marked.iter().map(|range| self.marked_turn(&text, range)).collect(),
            false => learnt.iter().map(|&at| turn(at)).collect::<Result<Vec<Turn>, _>>()?,
        };
        let others = match self.config.train_on_eos {
            Some(TrainOnEos::All) => (0..messages.len()).filter(|at| !learnt.contains(at)).collect(),
            _ => Vec::new(),
        };
        let ends_with_answer = messages.len().checked_sub(1).is_some_and(|last| {
            role(last) == "assistant"
                && learnt.last() == Some(&last)
                && chosen.last().is_some_and(|turn| turn.stop.is_none())
        });
        if self.config.train_on_eos == Some(TrainOnEos::Last) {
            let last = chosen.len().saturating_sub(1);
            chosen[..last].iter_mut().for_each(|turn| turn.stop = None);
        }
        let mut ranges: Vec<Range<usize>> =
            chosen.into_iter().flat_map(|turn| [Some(turn.written), turn.stop]).flatten().collect();
        for at in others {
            ranges.extend(turn(at)?.stop);
        }
        ranges.sort_by_key(|range| range.start);
        ranges.retain(|range| !range.is_empty());
        Ok(Prompt { supervised: character_ranges(&text, &joined(ranges)), ends_with_answer, text })
    }

    fn trains(&self, role: &str) -> bool {
        match &self.config.roles_to_train {
            Some(roles) => roles.iter().any(|trained| trained == role),
            None => role == "assistant",
        }
    }

    /// A turn that the template marked, white space after its end included as the template wants it.
    fn marked_turn(&self, text: &str, range: &Range<usize>) -> Turn {
        let written = text[range.clone()].trim_end();
        let stop = self.stops.iter().filter(|stop| written.ends_with(stop.as_str())).map(String::len).max();
        match stop {
            None => Turn { written: range.clone(), stop: None },
            Some(length) => {
                let start = range.start + written.len() - length;
                Turn { written: range.start..start, stop: Some(start..range.end) }
            }
        }
    }
}

/// What helps where a template does not show an answer's place.
const WRITE_MARKS: &str = "name another template with `chat_template`, best one with {% generation %} around what the assistant \
     writes; or check that the tokenizer's eos_token is the one that the template ends a turn with; or use type \
     `prompt_completion`";
const TRAIN_ASSISTANT: &str = "leave its role out of `roles_to_train`, and `train_on_eos: all` too";
const MARK_EACH: &str = "its {% generation %} blocks are not one for each of the assistant's messages, so single messages cannot \
     be left out of training";
const MARK_ASSISTANT: &str = "its {% generation %} blocks show what the assistant writes alone; leave other roles out of \
     `roles_to_train`, and `train_on_eos: all` too";

/// Ascending ranges, those that touch or overlap as one.
fn joined(ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    let mut out: Vec<Range<usize>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match out.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => out.push(range),
        }
    }
    out
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
    #![allow(clippy::unwrap_used)]
    use super::super::prompt::tests::prompt;
    use super::super::{DataError, DatasetConfig, DatasetType, MessageProperties};
    use crate::text::fixtures::{CHATML, chat};
    use serde_json::{Value, json};

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
        assert_eq!(learnt(moving, talk()).unwrap(), [" yes<|im_end|>", " n<|im_end|>"]);
    }

    /// The supervised pieces under a dataset's keys.
    fn learnt_with(keys: Value, template: &str, record: Value) -> Result<Vec<String>, DataError> {
        let mut config = json!({"path": "d.json", "type": "messages"});
        config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        let prompt = prompt(&serde_json::from_value(config).unwrap(), &chat(template), record)?;
        let text: Vec<char> = prompt.text.chars().collect();
        Ok(prompt.supervised.into_iter().map(|range| text[range].iter().collect()).collect())
    }

    #[test]
    fn roles_and_single_messages_are_chosen() {
        let learnt = |keys: Value| learnt_with(keys, CHATML, talk()).unwrap();
        assert_eq!(
            learnt(json!({"roles_to_train": ["user", "system"]})),
            ["Grüße<|im_end|>", "yes<|im_end|>", "ü?<|im_end|>"]
        );
        assert_eq!(learnt(json!({"roles_to_train": []})), [""; 0]);
        assert_eq!(learnt(json!({"train_on_eos": "last"})), ["yes", " n <|im_end|>"]);
        assert_eq!(
            learnt(json!({"train_on_eos": "all"})),
            ["<|im_end|>", "<|im_end|>", "yes<|im_end|>", "<|im_end|>", " n <|im_end|>"]
        );
        let flagged = |name: &str, flags: [Value; 3]| {
            let message = |(at, flag): (usize, Value)| {
                let role = if at == 0 { "user" } else { "assistant" };
                json!({"role": role, "content": at.to_string(), name: flag})
            };
            let messages: Vec<Value> = flags.into_iter().enumerate().map(message).collect();
            json!({ "messages": messages })
        };
        let none = || json!({});
        let record = || flagged("train", [json!(true), json!(false), Value::Null]);
        assert_eq!(learnt_with(none(), CHATML, record()).unwrap(), ["0<|im_end|>", "2<|im_end|>"]);
        let record = || flagged("weight", [Value::Null, json!(1), json!(0)]);
        assert_eq!(learnt_with(none(), CHATML, record()).unwrap(), ["1<|im_end|>"]);
        let record = || flagged("learn", [Value::Null, json!(false), json!(true)]);
        let keys = json!({"message_field_training": "learn"});
        assert_eq!(learnt_with(keys, CHATML, record()).unwrap(), ["2<|im_end|>"]);
        let error =
            learnt_with(none(), CHATML, flagged("weight", [json!(0.5), json!(1), json!(1)])).unwrap_err();
        assert!(
            error.to_string().contains("field `messages[0].weight`: expected true, false, 0 or 1"),
            "{error}"
        );
    }

    #[test]
    fn marks_of_the_template_win() {
        let marked = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}[{{ m.content }}]\
             {% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}";
        assert_eq!(learnt(marked, talk()).unwrap(), ["[yes]", "[ n ]"]);
        let mut record = talk();
        record["messages"][2]["train"] = json!(false);
        assert_eq!(learnt(marked, record).unwrap(), ["[ n ]"]);
        let error = learnt_with(json!({"roles_to_train": ["user"]}), marked, talk()).unwrap_err();
        assert!(error.to_string().contains("leave other roles out of `roles_to_train`"), "{error}");
        // Two blocks for one message: all of them together are right, but not one for each.
        let twice = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}a{% endgeneration %}-{% generation %}b\
             {% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}";
        assert_eq!(learnt(twice, talk()).unwrap(), ["a", "b", "a", "b"]);
        let mut record = talk();
        record["messages"][2]["train"] = json!(false);
        assert!(matches!(learnt(twice, record), Err(DataError::OpaqueTemplate { message: 5, .. })));
    }

    #[test]
    fn tools_and_variables_reach_the_template() {
        let template = "{{ tools | tojson }} {{ mode }}{% for m in messages %}{{ m.content }}{% endfor %}";
        let tools = json!([{"type": "function", "function": {"name": "f"}}]);
        let text = |keys: Value, name: &str, tools: Value| {
            let mut config =
                json!({"path": "d.json", "type": "messages", "chat_template_kwargs": {"mode": "m"}});
            config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
            let record = json!({"messages": [{"role": "assistant", "content": "a"}], name: tools});
            prompt(&serde_json::from_value(config).unwrap(), &chat(template), record)
                .map(|prompt| prompt.text)
        };
        let expected = r#"[{"type": "function", "function": {"name": "f"}}] ma"#;
        assert_eq!(text(json!({}), "tools", tools.clone()).unwrap(), expected);
        assert_eq!(text(json!({}), "tools", tools.to_string().into()).unwrap(), expected);
        assert_eq!(text(json!({"field_tools": "functions"}), "functions", tools.clone()).unwrap(), expected);
        assert_eq!(text(json!({}), "tools", Value::Null).unwrap(), "null ma");
        assert!(text(json!({"field_tools": "functions"}), "tools", tools).is_err());
        let error = text(json!({}), "tools", json!("f")).unwrap_err().to_string();
        assert!(error.contains("field `tools`: expected a list of functions"), "{error}");
    }

    #[test]
    fn a_content_that_occurs_elsewhere_is_not_mistaken() {
        // The template's own words, the other turns and the header all hold the contents; the last turn is written
        // differently, so that no beginning of the conversation is the text's.
        let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last %}user {% endif %}{{ m.content | trim }}\
             {% if m.role == 'assistant' %}<|im_end|>{% endif %} user\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\
             {% endif %}";
        let record = json!({"messages": [
            {"role": "user", "content": "assistant"}, {"role": "assistant", "content": " user "},
            {"role": "user", "content": "user"}, {"role": "assistant", "content": "user"},
            {"role": "user", "content": "?"}, {"role": "assistant", "content": " "}]});
        assert_eq!(
            learnt(template, record).unwrap(),
            ["user<|im_end|>", "user<|im_end|>", "user <|im_end|>"]
        );
    }

    #[test]
    fn templates_that_hide_the_answer_are_refused() {
        let shouting = "{% for m in messages %}{{ messages | length }}{{ m.content | upper }}{% endfor %}";
        let record = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "hello"},
            {"role": "user", "content": "b"}]});
        let error = learnt(shouting, record).unwrap_err();
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
