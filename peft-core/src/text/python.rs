//! Python's ways of writing values, which chat templates were written against.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind};

/// `json.dumps` with the arguments that templates use.
pub(super) struct Json {
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
    ensure_ascii: bool,
}

impl Json {
    /// Takes `indent`, `separators`, `sort_keys` and `ensure_ascii` from a filter's keyword arguments.
    pub(super) fn from_kwargs(indent: Option<Value>, kwargs: &Kwargs) -> Result<Self, Error> {
        let indent = match indent {
            Some(value) => Some(value),
            None => kwargs.get::<Option<Value>>("indent")?,
        };
        let indent = match indent {
            None => None,
            Some(value) if value.is_none() => None,
            Some(value) => Some(match value.as_str() {
                Some(text) => text.to_string(),
                None => " ".repeat(usize::try_from(value)?.min(64)),
            }),
        };
        let default = if indent.is_some() { "," } else { ", " };
        let (item_separator, key_separator) = match kwargs.get::<Option<Vec<String>>>("separators")? {
            Some(pair) if pair.len() == 2 => (pair[0].clone(), pair[1].clone()),
            Some(_) => {
                return Err(Error::new(ErrorKind::InvalidOperation, "separators are a pair of strings"));
            }
            None => (default.to_string(), ": ".to_string()),
        };
        let sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
        let ensure_ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
        kwargs.assert_all_used()?;
        Ok(Self { indent, item_separator, key_separator, sort_keys, ensure_ascii })
    }

    /// Bytes that every value takes besides its own, and that it takes for each level it stands at.
    pub(super) fn overhead(&self) -> (usize, usize) {
        let indent = self.indent.as_ref().map_or(0, String::len);
        (16 + self.item_separator.len() + self.key_separator.len() + indent, indent)
    }

    /// The value as JSON text.
    pub(super) fn dump(&self, value: &Value) -> Result<String, Error> {
        let mut out = String::new();
        self.write(&mut out, value, 0)?;
        Ok(out)
    }

    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > 100 {
            return Err(Error::new(ErrorKind::InvalidOperation, "value is nested too deep for JSON"));
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&match float(value) {
                Some(x) if x.is_nan() => "NaN".to_string(),
                Some(x) if x.is_infinite() => (if x > 0.0 { "Infinity" } else { "-Infinity" }).to_string(),
                Some(x) => float_repr(x),
                None => value.to_string(),
            }),
            ValueKind::String => self.write_string(out, value.as_str().unwrap_or_default()),
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.write_items(out, ('{', '}'), keys, depth, |json, out, key| {
                    match key.as_str() {
                        Some(text) => json.write_string(out, text),
                        None => {
                            let mut text = String::new();
                            json.write(&mut text, &key, depth + 1)?;
                            json.write_string(out, &text);
                        }
                    }
                    out.push_str(&json.key_separator);
                    json.write(out, &value.get_item(&key)?, depth + 1)
                })?;
            }
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.collect();
                self.write_items(out, ('[', ']'), items, depth, |json, out, item| {
                    json.write(out, &item, depth + 1)
                })?;
            }
            kind => {
                let problem = format!("{kind} is not JSON serializable");
                return Err(Error::new(ErrorKind::InvalidOperation, problem));
            }
        }
        Ok(())
    }

    fn write_items(
        &self,
        out: &mut String,
        (open, close): (char, char),
        items: Vec<Value>,
        depth: usize,
        mut write: impl FnMut(&Self, &mut String, Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let newline = |out: &mut String, depth: usize| {
            if let Some(indent) = &self.indent {
                out.push('\n');
                out.push_str(&indent.repeat(depth));
            }
        };
        out.push(open);
        let empty = items.is_empty();
        for (at, item) in items.into_iter().enumerate() {
            if at > 0 {
                out.push_str(&self.item_separator);
            }
            newline(out, depth + 1);
            write(self, out, item)?;
        }
        if !empty {
            newline(out, depth);
        }
        out.push(close);
        Ok(())
    }

    fn write_string(&self, out: &mut String, text: &str) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// `str(value)`: what `{{ value }}` prints.
pub(super) fn to_str(value: &Value) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::String => value.as_str().unwrap_or_default().to_string(),
        _ => repr(value, 0),
    }
}

fn repr(value: &Value, depth: usize) -> String {
    if depth > 100 {
        return "...".into();
    }
    let join = |items: Vec<String>| items.join(", ");
    match value.kind() {
        ValueKind::None => "None".into(),
        ValueKind::Bool => (if value.is_true() { "True" } else { "False" }).into(),
        ValueKind::Number => float(value).map_or_else(|| value.to_string(), float_repr),
        ValueKind::String => string_repr(value.as_str().unwrap_or_default()),
        ValueKind::Seq => {
            let items = value.try_iter().into_iter().flatten();
            format!("[{}]", join(items.map(|item| repr(&item, depth + 1)).collect()))
        }
        ValueKind::Map => {
            let pair = |key: Value| {
                let item = value.get_item(&key).unwrap_or_default();
                format!("{}: {}", repr(&key, depth + 1), repr(&item, depth + 1))
            };
            format!("{{{}}}", join(value.try_iter().into_iter().flatten().map(pair).collect()))
        }
        _ => value.to_string(),
    }
}

fn string_repr(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if c < ' ' || c == '\u{7f}' => out.push_str(&format!("\\x{:02x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// The value as a float if it is one; integers are none.
fn float(value: &Value) -> Option<f64> {
    (value.kind() == ValueKind::Number && !value.is_integer()).then(|| f64::try_from(value.clone()).ok())?
}

/// `repr` of a float: the shortest digits that read back the same, with an exponent outside 1e-4 … 1e16.
fn float_repr(x: f64) -> String {
    if !x.is_finite() {
        return (if x.is_nan() {
            "nan"
        } else if x > 0.0 {
            "inf"
        } else {
            "-inf"
        })
        .into();
    }
    let scientific = format!("{x:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>().unwrap_or(0) {
        exponent @ -4..16 => {
            let plain = format!("{x}");
            if exponent >= 0 && !plain.contains('.') { plain + ".0" } else { plain }
        }
        exponent if exponent < 0 => format!("{mantissa}e-{:02}", -exponent),
        exponent => format!("{mantissa}e+{exponent:02}"),
    }
}

/// Methods of Python strings that templates call and the engine's own compatibility layer lacks; `None` for others.
pub(super) fn string_method(text: &str, method: &str, args: &[Value]) -> Option<Value> {
    let argument = |at: usize| args.get(at).and_then(|value| value.as_str());
    let triple = |parts: [&str; 3]| Value::from(parts.map(Value::from).to_vec());
    Some(match (method, argument(0)) {
        ("removeprefix", Some(prefix)) => Value::from(text.strip_prefix(prefix).unwrap_or(text)),
        ("removesuffix", Some(suffix)) => Value::from(text.strip_suffix(suffix).unwrap_or(text)),
        ("partition", Some(separator)) => match text.split_once(separator) {
            Some((head, tail)) => triple([head, separator, tail]),
            None => triple([text, "", ""]),
        },
        ("rpartition", Some(separator)) => match text.rsplit_once(separator) {
            Some((head, tail)) => triple([head, separator, tail]),
            None => triple(["", "", text]),
        },
        ("rsplit", Some(separator)) if !separator.is_empty() => {
            let limit = args.get(1).and_then(|value| usize::try_from(value.clone()).ok());
            let mut parts: Vec<&str> = match limit {
                Some(limit) => text.rsplitn(limit.saturating_add(1), separator).collect(),
                None => text.rsplit(separator).collect(),
            };
            parts.reverse();
            Value::from(parts.into_iter().map(Value::from).collect::<Vec<_>>())
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn floats_are_written_as_python_writes_them() {
        let cases = [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (-2.5, "-2.5"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0, "0.0"),
        ];
        for (x, expected) in cases {
            assert_eq!(float_repr(x), expected);
        }
    }
}
