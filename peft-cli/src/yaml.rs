//! Values as YAML and as words of a command line, for people to read, copy and run.

use serde_json::Value;

/// A value as YAML that reads back as the same value.
fn text(value: &Value) -> String {
    // A JSON value has nothing that YAML cannot hold, and JSON itself is YAML.
    serde_saphyr::to_string(value).unwrap_or_else(|_| format!("{value:#}"))
}

/// `text` as a double-quoted YAML scalar, on one line whatever is in it.
pub fn string(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            // YAML takes the last four for line breaks or forbids them.
            c if c.is_control() || ['\u{2028}', '\u{2029}', '\u{feff}', '\u{fffe}'].contains(&c) => {
                out.push_str(&format!("\\u{:04x}", u32::from(c)));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// A resolved recipe as YAML that `peft train` takes as it is. Of the data files only the keys that say something are
/// written; elsewhere null may differ from the default and stands.
pub fn recipe(recipe: &Value) -> String {
    let mut recipe = recipe.clone();
    for key in ["datasets", "eval_datasets"] {
        for entry in recipe.get_mut(key).and_then(Value::as_array_mut).into_iter().flatten() {
            if let Some(keys) = entry.as_object_mut() {
                keys.retain(|_, value| !value.is_null());
            }
        }
    }
    text(&recipe)
}

/// A word that a POSIX shell takes as it stands.
pub fn shell(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:,@%".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_string(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    #[test]
    fn yaml_reads_back_as_the_same_value() {
        let value = json!({
            "words": ["yes", "null", "1e3", "0x1F", "~", "a: b", "# c", "- d", "", " e ", "f\ng", "ä \"'", "{h}", "@i", "1_000"],
            "numbers": [0, -1, 5e-3, 1e-8, 1e300, 0.999],
            "nothing": null, "truth": true, "empty": {}, "none": [],
            "nested": {"list": [{"path": "a", "type": "b"}, [1, 2]]},
        });
        let written = text(&value);
        let read: Value = serde_saphyr::from_str(&written).unwrap();
        assert_eq!(read, value, "{written}");
    }

    #[test]
    fn a_recipe_keeps_the_nulls_that_mean_something() {
        let written = recipe(&json!({"datasets": [{"path": "a", "limit": null}], "max_grad_norm": null}));
        let read: Value = serde_saphyr::from_str(&written).unwrap();
        assert_eq!(read, json!({"datasets": [{"path": "a"}], "max_grad_norm": null}));
    }

    #[test]
    fn words_for_a_shell() {
        assert_eq!(shell("out/quickstart"), "out/quickstart");
        assert_eq!(shell("a b's $x"), r"'a b'\''s $x'");
        assert_eq!(shell(""), "''");
    }

    #[test]
    fn any_text_comes_back() {
        for text in
            ["plain", "a: b # c", "\"q\" \\ 'x'", "two\nlines\ttab\r", "\u{85}\u{2028}\u{7f}ü🦙", "", "yes"]
        {
            let yaml = string(text);
            assert_eq!(yaml.lines().count(), 1, "{yaml}");
            assert_eq!(serde_saphyr::from_str::<String>(&yaml).unwrap(), text, "{yaml}");
        }
    }
}
