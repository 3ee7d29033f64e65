//! Chat templates: Jinja as `transformers` runs it, in an engine that can only produce a bounded string.
//!
//! A template comes with a downloaded model and is not trusted. It sees the messages and the special tokens and
//! nothing else; it has no loader, its steps, its recursion and its output are limited.
//!
//! Known differences from Python: `~` joins `none`, booleans and lists as the engine writes them, there is no `%` for
//! strings, and iterating over `none` is empty instead of an error.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::io;

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, UndefinedBehavior};
use serde_json::Map;

use super::{TextError, date, python};

/// Steps of the engine for one rendering; a conversation takes some fifty a message.
const MAX_STEPS: u64 = 5_000_000;
/// Nesting of macro calls.
const MAX_RECURSION: usize = 100;
/// Bytes of output of one rendering.
const MAX_OUTPUT: usize = 64 << 20;
const NAME: &str = "chat_template";

/// A model's way to write a conversation.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: BTreeMap<String, String>,
    uses_date: bool,
}

impl ChatTemplate {
    /// Parses a template. `special_tokens` maps roles such as `bos_token` to text; they are variables of the template.
    ///
    /// # Errors
    /// When the source is not valid Jinja.
    pub fn new(source: String, special_tokens: &BTreeMap<String, String>) -> Result<Self, TextError> {
        let uses_date = source.contains("strftime_now");
        let mut environment = environment();
        environment
            .add_template_owned(NAME, without_generation_tags(&source))
            .map_err(|error| TextError::TemplateSyntax(describe(&error)))?;
        let mut template = Self { environment, special_tokens: special_tokens.clone(), uses_date };
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        template.set_time(now.map_or(0, |since| since.as_secs()));
        Ok(template)
    }

    /// What the template takes for the present, in seconds since 1970 (UTC); without this, the time of
    /// [`new`](Self::new).
    pub fn set_time(&mut self, unix_seconds: u64) {
        self.environment.add_function("strftime_now", move |format: &str| {
            date::strftime(format, unix_seconds).ok_or_else(|| {
                Error::new(ErrorKind::InvalidOperation, format!("date format `{format}` is not supported"))
            })
        });
    }

    /// Whether the template asks for the date, so that its output depends on [`set_time`](Self::set_time).
    pub fn uses_date(&self) -> bool {
        self.uses_date
    }

    /// Writes `messages` (objects with `role` and `content`, as in the chat format) as one string. With
    /// `add_generation_prompt` the string ends where the assistant's answer begins. `extra` are further variables,
    /// for example `enable_thinking`.
    ///
    /// # Errors
    /// When the template refuses the messages (`raise_exception`), fails on them, or exceeds its limits.
    pub fn render(
        &self,
        messages: &[serde_json::Value],
        add_generation_prompt: bool,
        extra: &Map<String, serde_json::Value>,
    ) -> Result<String, TextError> {
        let mut variables: BTreeMap<&str, Value> = BTreeMap::new();
        for (role, token) in &self.special_tokens {
            variables.insert(role, Value::from(token.as_str()));
        }
        variables.insert("tools", Value::from(()));
        variables.insert("documents", Value::from(()));
        for (name, value) in extra {
            variables.insert(name, Value::from_serialize(value));
        }
        variables.insert("messages", Value::from_serialize(messages));
        variables.insert("add_generation_prompt", Value::from(add_generation_prompt));

        let mut output = Bounded(Vec::new());
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render_captured_to(variables, &mut output).map(drop))
            .map_err(|error| classify(&error))?;
        String::from_utf8(output.0).map_err(|error| TextError::TemplateFailed(error.to_string()))
    }
}

/// The engine, set up as `transformers` sets up its own.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_fuel(Some(MAX_STEPS));
    environment.set_recursion_limit(MAX_RECURSION);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_formatter(|out, _, value| {
        let text = python::to_str(value);
        out.write_str(&text).map_err(Error::from)
    });
    environment.set_unknown_method_callback(method);
    environment.add_filter("tojson", |value: Value, indent: Option<Value>, kwargs: Kwargs| {
        python::Json::from_kwargs(indent, &kwargs)?.dump(&value)
    });
    environment.add_filter("string", |value: Value| python::to_str(&value));
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String)
    });
    environment.add_test("iterable", |value: &Value| {
        matches!(value.kind(), ValueKind::String | ValueKind::Undefined) || value.try_iter().is_ok()
    });
    environment.add_function("raise_exception", |message: Value| -> Result<String, Error> {
        let refusal = Refusal(python::to_str(&message));
        Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(refusal))
    });
    environment
}

fn method(state: &State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    match value.as_str().and_then(|text| python::string_method(text, method, args)) {
        Some(result) => Ok(result),
        None => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// `{% generation %}` marks what the assistant wrote, an extension that changes nothing in the text: the marks become
/// blocks without effect that keep their whitespace control.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else {
            break;
        };
        let inside = &rest[start + 2..start + length];
        let left = inside.strip_prefix(['-', '+']).map_or("", |_| &inside[..1]);
        let body = &inside[left.len()..];
        let right = body.strip_suffix(['-', '+']).map_or("", |_| &body[body.len() - 1..]);
        out.push_str(&rest[..start]);
        match body[..body.len() - right.len()].trim() {
            "generation" => out.push_str(&format!("{{%{left} if true {right}%}}")),
            "endgeneration" => out.push_str(&format!("{{%{left} endif {right}%}}")),
            _ => out.push_str(&rest[start..start + length + 2]),
        }
        rest = &rest[start + length + 2..];
    }
    out.push_str(rest);
    out
}

/// What a template said to `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

/// Output that stops at [`MAX_OUTPUT`].
struct Bounded(Vec<u8>);

/// Why [`Bounded`] stopped.
#[derive(Debug, thiserror::Error)]
#[error("output limit")]
struct OutputLimit;

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > MAX_OUTPUT - self.0.len() {
            return Err(io::Error::other(OutputLimit));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn classify(error: &Error) -> TextError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(Refusal(message)) = current.downcast_ref() {
            return TextError::TemplateRefused(message.clone());
        }
        if current.downcast_ref::<io::Error>().is_some() {
            return TextError::TemplateLimit(format!("{MAX_OUTPUT} bytes of output"));
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
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn parse(source: &str) -> Result<ChatTemplate, TextError> {
        let tokens = [("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")];
        ChatTemplate::new(source.into(), &tokens.map(|(role, text)| (role.into(), text.into())).into())
    }

    fn template(source: &str) -> ChatTemplate {
        parse(source).unwrap()
    }

    fn render(source: &str) -> Result<String, TextError> {
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
    fn limits_end_a_template_that_does_not() {
        let loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
        assert!(matches!(render(loops), Err(TextError::TemplateLimit(what)) if what == "5000000 steps"));
        let calls = "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}";
        assert!(matches!(render(calls), Err(TextError::TemplateFailed(_))));
        let writes = "{% set x = 'x' * 1000000 %}{% for a in range(99999) %}{{ x }}{% endfor %}";
        assert!(
            matches!(render(writes), Err(TextError::TemplateLimit(what)) if what.ends_with("bytes of output"))
        );
        assert!(matches!(render("{% include '/etc/passwd' %}"), Err(TextError::TemplateFailed(_))));
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
