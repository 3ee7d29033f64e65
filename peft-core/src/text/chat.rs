//! Chat templates: Jinja as `transformers` runs it, in an engine that can only produce a bounded string.
//!
//! A template comes with a downloaded model and is not trusted. It sees the messages, the special tokens and the
//! variables that the user named, and nothing else; it has no loader, and its steps, its recursion and the bytes that it
//! reads and writes are limited.
//!
//! Known differences from Python: there is no `%` for strings, no `*` or `**` before an argument, and a function or a
//! generator is not printed as Python prints it.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::ops::Range;

use minijinja::value::Value;
use minijinja::{Error, ErrorKind};
use serde_json::Map;

use super::builtins::{MARKING, MARKS, Refusal};
use super::engine::{MAX_STEPS, Program};
use super::meter::{OutOfMemory, meter};
use super::{TextError, date};

/// The names under which a message's reasoning is passed; `transformers` fills the first from the others.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A model's way to write a conversation.
#[derive(Debug)]
pub struct ChatTemplate {
    program: Program,
    special_tokens: BTreeMap<String, String>,
    uses_date: bool,
    marks_generation: bool,
}

impl ChatTemplate {
    /// Parses a template. `special_tokens` maps roles such as `bos_token` to text; they are variables of the template.
    ///
    /// # Errors
    /// When the source is not valid Jinja, or has a tag or an expression of absurd length.
    pub fn new(source: String, special_tokens: &BTreeMap<String, String>) -> Result<Self, TextError> {
        let uses_date = source.contains("strftime_now");
        let (source, marks_generation) = with_generation_filters(&source);
        let program = Program::new(source).map_err(|error| TextError::TemplateSyntax(describe(&error)))?;
        let special_tokens = special_tokens.clone();
        let mut template = Self { program, special_tokens, uses_date, marks_generation };
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        template.set_time(now.map_or(0, |since| since.as_secs()));
        Ok(template)
    }

    /// What the template takes for the present, in seconds since 1970 (UTC); without this, the time of
    /// [`new`](Self::new).
    pub fn set_time(&mut self, unix_seconds: u64) {
        self.program.add_function("strftime_now", move |state: &minijinja::State, format: &str| {
            meter(state)?.charge(16 * format.len())?;
            date::strftime(format, unix_seconds).ok_or_else(|| {
                Error::new(ErrorKind::InvalidOperation, format!("date format `{format}` is not supported"))
            })
        });
    }

    /// Whether the template asks for the date, so that its output depends on [`set_time`](Self::set_time).
    pub fn uses_date(&self) -> bool {
        self.uses_date
    }

    /// Whether the template says by `{% generation %}` which text the model should learn.
    pub fn marks_generation(&self) -> bool {
        self.marks_generation
    }

    /// Writes `messages` (objects with `role` and `content`, as in the chat format) as one string. With
    /// `add_generation_prompt` the string ends where the assistant's answer begins. `extra` are further variables,
    /// for example `tools`, `documents` or `enable_thinking`; they win over special tokens of the same name.
    ///
    /// As in `transformers`, a property of a message that is null counts as absent, and reasoning is found under each of
    /// its usual names.
    ///
    /// # Errors
    /// When the template refuses the messages (`raise_exception`), fails on them, or exceeds its limits.
    pub fn render(
        &self,
        messages: &[serde_json::Value],
        add_generation_prompt: bool,
        extra: &Map<String, serde_json::Value>,
    ) -> Result<String, TextError> {
        self.run(self.variables(messages, add_generation_prompt, extra), input_bytes(messages, extra))
    }

    /// As [`render`](Self::render) without a generation prompt, with the text's `{% generation %}` blocks as ascending
    /// ranges of bytes.
    ///
    /// # Errors
    /// As for `render`; also when the messages hold the noncharacters U+FDD0 or U+FDD1, which serve as marks.
    pub fn render_marked(
        &self,
        messages: &[serde_json::Value],
        extra: &Map<String, serde_json::Value>,
    ) -> Result<(String, Vec<Range<usize>>), TextError> {
        let plain = self.render(messages, false, extra)?;
        if !self.marks_generation {
            return Ok((plain, Vec::new()));
        }
        let mut variables = self.variables(messages, false, extra);
        variables.insert(MARKING, Value::from(true));
        let marked = self.run(variables, input_bytes(messages, extra))?;
        let failed = |problem: &str| TextError::TemplateFailed(format!("its `generation` blocks {problem}"));
        let (mut text, mut ranges, mut start) = (String::with_capacity(plain.len()), Vec::new(), None);
        for c in marked.chars() {
            match (MARKS.iter().position(|&mark| mark == c), start) {
                (None, _) => text.push(c),
                (Some(0), None) => start = Some(text.len()),
                (Some(1), Some(from)) => {
                    ranges.push(from..text.len());
                    start = None;
                }
                _ => return Err(failed("are nested, or the messages hold U+FDD0 or U+FDD1")),
            }
        }
        match start.is_none() && text == plain {
            true => Ok((text, ranges)),
            false => Err(failed("are not written where they stand")),
        }
    }

    /// Writes `messages` up to the end of the last one's content, for a model to go on from there.
    ///
    /// # Errors
    /// As for [`render`](Self::render); also when the last message has no content that is a text, or the template does
    /// not write it.
    pub fn render_open(
        &self,
        messages: &[serde_json::Value],
        extra: &Map<String, serde_json::Value>,
    ) -> Result<String, TextError> {
        const TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";
        let failed = |problem: &str| TextError::TemplateFailed(format!("the last message {problem}"));
        let mut messages = messages.to_vec();
        let content = messages.last_mut().and_then(|message| message.get_mut("content"));
        let text = match content {
            Some(serde_json::Value::Array(parts)) => {
                parts.iter_mut().rev().find_map(|part| part.get_mut("text"))
            }
            other => other,
        };
        let Some(serde_json::Value::String(text)) = text else {
            return Err(failed("has no text to go on from"));
        };
        let content = text.trim().to_string();
        text.push_str(TAG);
        let mut rendered = self.render(&messages, false, extra)?;
        match rendered.rfind(TAG.trim_end()) {
            Some(at) if rendered.contains(&content) => {
                let spaced = rendered[at..].starts_with(TAG);
                rendered.truncate(at);
                if !spaced {
                    rendered.truncate(rendered.trim_end().len());
                }
                Ok(rendered)
            }
            _ => Err(failed("does not appear in what the template writes")),
        }
    }

    fn variables<'a>(
        &'a self,
        messages: &[serde_json::Value],
        add_generation_prompt: bool,
        extra: &'a Map<String, serde_json::Value>,
    ) -> BTreeMap<&'a str, Value> {
        let mut variables: BTreeMap<&str, Value> = BTreeMap::new();
        for (role, token) in &self.special_tokens {
            variables.insert(role, Value::from(token.as_str()));
        }
        variables.insert("tools", Value::from(()));
        variables.insert("documents", Value::from(()));
        for (name, value) in extra {
            variables.insert(name, Value::from_serialize(value));
        }
        let messages: Vec<serde_json::Value> = messages.iter().map(as_templates_expect).collect();
        variables.insert("messages", Value::from_serialize(&messages));
        variables.insert("add_generation_prompt", Value::from(add_generation_prompt));
        variables
    }

    fn run(&self, variables: BTreeMap<&str, Value>, input_bytes: usize) -> Result<String, TextError> {
        self.program.run(variables, input_bytes).map_err(|error| classify(&error))
    }
}

/// A message without its null properties, and with its reasoning under the names that templates look for.
fn as_templates_expect(message: &serde_json::Value) -> serde_json::Value {
    let serde_json::Value::Object(message) = message else {
        return message.clone();
    };
    let present = message.iter().filter(|(_, value)| !value.is_null());
    let mut message: Map<_, _> = present.map(|(key, value)| (key.clone(), value.clone())).collect();
    if let Some(reasoning) = REASONING.iter().find_map(|name| message.get(*name)).cloned() {
        message.entry("thinking").or_insert_with(|| reasoning.clone());
        message.insert(REASONING[0].into(), reasoning);
    }
    message.into()
}

/// The size of what a rendering is given, for its limits.
fn input_bytes(messages: &[serde_json::Value], extra: &Map<String, serde_json::Value>) -> usize {
    fn size(value: &serde_json::Value) -> usize {
        match value {
            serde_json::Value::String(text) => 16 + text.len(),
            serde_json::Value::Array(items) => 16 + items.iter().map(size).sum::<usize>(),
            serde_json::Value::Object(items) => {
                16 + items.iter().map(|(key, value)| key.len() + size(value)).sum::<usize>()
            }
            _ => 16,
        }
    }
    messages.iter().chain(extra.values()).map(size).sum()
}

/// `{% generation %}` marks what the assistant wrote, an extension that changes nothing in the text: the marks become
/// filter blocks with a scope of their own that keep the marks' whitespace control. Also says whether there are any.
fn with_generation_filters(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len());
    let mut found = false;
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        // The two share no character: `{%}` opens a tag and does not close it.
        let Some(length) = rest[start + 2..].find("%}").map(|length| length + 2) else {
            break;
        };
        let inside = &rest[start + 2..start + length];
        let left = inside.strip_prefix(['-', '+']).map_or("", |_| &inside[..1]);
        let body = &inside[left.len()..];
        let right = body.strip_suffix(['-', '+']).map_or("", |_| &body[body.len() - 1..]);
        out.push_str(&rest[..start]);
        match body[..body.len() - right.len()].trim() {
            "generation" => {
                found = true;
                out.push_str(&format!("{{%{left} filter generation %}}{{% with {right}%}}"));
            }
            "endgeneration" => out.push_str(&format!("{{%{left} endwith %}}{{% endfilter {right}%}}")),
            _ => out.push_str(&rest[start..start + length + 2]),
        }
        rest = &rest[start + length + 2..];
    }
    out.push_str(rest);
    (out, found)
}

fn classify(error: &Error) -> TextError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(Refusal(message)) = current.downcast_ref() {
            return TextError::TemplateRefused(message.clone());
        }
        if current.downcast_ref::<OutOfMemory>().is_some() {
            return TextError::TemplateLimit("bytes read and written".into());
        }
        if current.downcast_ref::<Error>().is_some_and(|error| error.kind() == ErrorKind::OutOfFuel) {
            return TextError::TemplateLimit(format!("{MAX_STEPS} steps"));
        }
        cause = current.source();
    }
    TextError::TemplateFailed(describe(error))
}

/// The engine's message and the messages beneath it.
fn describe(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(current) = cause {
        text.push_str(&format!(": {current}"));
        cause = current.source();
    }
    text
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    pub(in crate::text) fn parse(source: &str) -> Result<ChatTemplate, TextError> {
        let tokens = [("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")];
        ChatTemplate::new(source.into(), &tokens.map(|(role, text)| (role.into(), text.into())).into())
    }

    pub(in crate::text) fn template(source: &str) -> ChatTemplate {
        parse(source).unwrap()
    }

    pub(in crate::text) fn render(source: &str) -> Result<String, TextError> {
        template(source).render(&[json!({"role": "user", "content": "Hi"})], false, &Map::new())
    }

    /// The cases and what Python makes of them come from `scripts/chat_reference.py`.
    #[test]
    fn renders_as_the_reference_does() {
        let cases: serde_json::Value = serde_json::from_str(include_str!("chat_cases.json")).unwrap();
        let mut failures = Vec::new();
        for case in cases.as_array().unwrap() {
            let text = |key: &str| case[key].as_str().unwrap();
            let result = parse(text("template")).and_then(|template| {
                template.render(
                    case["messages"].as_array().unwrap(),
                    case["add_generation_prompt"].as_bool().unwrap(),
                    case["extra"].as_object().unwrap(),
                )
            });
            let got = match result {
                Ok(got) => got,
                Err(TextError::TemplateRefused(message)) => format!("raised: {message}"),
                Err(error) => format!("error: {error}"),
            };
            if got != text("expected") {
                failures.push(format!(
                    "{}\n  expected {:?}\n  got      {got:?}",
                    text("name"),
                    text("expected")
                ));
            }
        }
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }

    #[test]
    fn generation_blocks_are_found_and_change_nothing() {
        let source = "{% for m in messages %}\n  {%- if m.role == 'user' %}\n{{ m.content }}\n  {% else %}\n<a>\n  {% generation %}\n\
             {{ m.content }}\n  {%- endgeneration -%}\n  \n{% endif %}\n{% endfor %}";
        let messages =
            [json!({"role": "user", "content": "q"}), json!({"role": "assistant", "content": "é"})];
        let (text, ranges) = template(source).render_marked(&messages, &Map::new()).unwrap();
        assert_eq!(text, template(source).render(&messages, false, &Map::new()).unwrap());
        assert_eq!(ranges.iter().map(|range| &text[range.clone()]).collect::<Vec<_>>(), ["é"]);
        let marks = [json!({"role": "assistant", "content": "\u{fdd0}"})];
        assert!(matches!(
            template(source).render_marked(&marks, &Map::new()),
            Err(TextError::TemplateFailed(_))
        ));
    }

    #[test]
    fn refusals_and_mistakes_are_told_apart() {
        let refused = render("{{ raise_exception('roles must alternate') }}").unwrap_err();
        assert_eq!(refused.to_string(), "the chat template refuses these messages: roles must alternate");
        let parsed = ChatTemplate::new("{% for %}".into(), &BTreeMap::new());
        assert!(matches!(parsed, Err(TextError::TemplateSyntax(_))));
        assert!(matches!(render("{{ nothing.at.all }}"), Err(TextError::TemplateFailed(_))));
    }

    #[test]
    fn the_date_is_today_or_the_one_that_was_set() {
        let mut dated = template("{{ strftime_now('%d %b %Y') }}");
        assert!(dated.uses_date() && !template("{{ messages }}").uses_date());
        dated.set_time(1_721_952_000);
        assert_eq!(dated.render(&[], false, &Map::new()).unwrap(), "26 Jul 2024");
        let year: u64 = render("{{ strftime_now('%Y') }}").unwrap().parse().unwrap();
        assert!(year >= 2025);
    }
}
