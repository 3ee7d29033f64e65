//! What every card is made of.

use super::MARKER;
use crate::yaml;
use serde_json::{Map, Value};
use std::path::Path;

/// What a command line or recipe named: a repository of the hub, or a folder.
pub struct Named {
    /// The id, where it is one.
    pub hub_id: Option<String>,
    /// What people may read: the id, or the folder's own name.
    pub shown: String,
    /// Its branch, tag or commit.
    pub revision: Option<String>,
}

impl Named {
    /// A name that was opened is a folder if there is one, and a hub id otherwise.
    pub fn new(name: &str, revision: Option<&str>) -> Self {
        let path = Path::new(name);
        if !path.is_dir() {
            let revision = revision.map(str::to_string);
            return Self { hub_id: Some(name.to_string()), shown: name.to_string(), revision };
        }
        let own = path.file_name().map(|name| name.to_os_string());
        let own = own.or_else(|| path.canonicalize().ok()?.file_name().map(|name| name.to_os_string()));
        let shown =
            own.map_or_else(|| "local folder".to_string(), |name| name.to_string_lossy().into_owned());
        Self { hub_id: None, shown, revision: None }
    }

    /// As a table shows it.
    pub fn described(&self) -> String {
        match (&self.hub_id, &self.revision) {
            (None, _) => format!("{}, a local folder", code(&self.shown)),
            (Some(_), Some(revision)) => format!("{} at {}", code(&self.shown), code(revision)),
            (Some(_), None) => code(&self.shown),
        }
    }

    /// As an argument of `from_pretrained`.
    pub fn python(&self) -> String {
        let name = Value::from(self.shown.as_str());
        match &self.revision {
            Some(revision) => format!("{name}, revision={}", Value::from(revision.as_str())),
            None => name.to_string(),
        }
    }

    /// As flags of this program.
    pub fn flags(&self) -> String {
        let name = format!("--base-model {}", yaml::shell(&self.shown));
        match &self.revision {
            Some(revision) => format!("{name} --revision {}", yaml::shell(revision)),
            None => name,
        }
    }
}

/// The front matter, and the line that says whose card it is.
pub fn front_matter(base: &Named, relation: &str, library: &str, tags: &[&str]) -> String {
    let mut out = String::from("---\n");
    if let Some(id) = &base.hub_id {
        out.push_str(&format!("base_model: {}\n", yaml::string(id)));
    }
    out.push_str(&format!("base_model_relation: {relation}\nlibrary_name: {library}\n"));
    out.push_str("pipeline_tag: text-generation\ntags:\n");
    for tag in tags {
        out.push_str(&format!("- {}\n", yaml::string(tag)));
    }
    out.push_str(&format!("---\n{MARKER}\n\n"));
    out
}

/// A name as Markdown shows it, unable to be anything else there.
pub fn code(text: &str) -> String {
    let clean = |c: char| match c {
        '`' => '\'',
        '|' => '¦',
        c if c.is_control() => ' ',
        c => c,
    };
    format!("`{}`", text.chars().map(clean).collect::<String>())
}

/// A table with a header; the cells are Markdown.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let mut out = line(&header.iter().map(|cell| cell.to_string()).collect::<Vec<_>>());
    out.push_str(&line(&vec!["---".to_string(); header.len()]));
    rows.iter().for_each(|row| out.push_str(&line(row)));
    out
}

/// Rows of what a method's block says, keys that say nothing left out.
pub fn method_rows(block: &Map<String, Value>) -> Vec<Vec<String>> {
    let says = |value: &Value| match value {
        Value::Null | Value::Bool(false) => false,
        Value::Object(map) => !map.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::String(text) => text != "none",
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::Bool(true) => true,
    };
    let shown = |value: &Value| match value.as_str() {
        Some(text) => code(text),
        None => code(&value.to_string()),
    };
    let kept = block.iter().filter(|(key, value)| says(value) && *key != "type");
    kept.map(|(key, value)| vec![code(key), shown(value)]).collect()
}

/// Tags of the method `name`, finest last.
pub fn method_tags<'a>(name: &'a str, block: &Map<String, Value>) -> Vec<&'a str> {
    let on = |key: &str| block.get(key) == Some(&Value::Bool(true));
    let kinds = [("use_rslora", "rslora"), ("use_dora", "dora")];
    let kinds = kinds.into_iter().filter(|(key, _)| on(key)).map(|(_, tag)| tag);
    std::iter::once(name).chain(kinds).collect()
}

/// The fenced code.
pub fn fence(language: &str, text: &str) -> String {
    format!("```{language}\n{text}\n```\n")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    /// The values between the two lines `---`.
    fn parsed(card: &str) -> Value {
        let body = card.strip_prefix("---\n").unwrap();
        let (front, rest) = body.split_once("\n---\n").unwrap();
        assert!(rest.starts_with(MARKER));
        serde_saphyr::from_str(front).unwrap()
    }

    #[test]
    fn front_matter_is_what_the_hub_reads() {
        let base = Named::new("org/name", Some("v1"));
        assert_eq!(
            parsed(&front_matter(&base, "adapter", "peft", &["lora", "yes"])),
            json!({
                "base_model": "org/name",
                "base_model_relation": "adapter",
                "library_name": "peft",
                "pipeline_tag": "text-generation",
                "tags": ["lora", "yes"],
            })
        );
        assert_eq!(base.python(), r#""org/name", revision="v1""#);
        assert_eq!(base.flags(), "--base-model org/name --revision v1");
        let strange = Named::new("a: \"b\"\n---\nx: 1", None);
        assert_eq!(
            parsed(&front_matter(&strange, "merge", "transformers", &[]))["base_model"],
            "a: \"b\"\n---\nx: 1"
        );
    }

    #[test]
    fn a_folder_is_shown_by_its_own_name_alone() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("my `base`");
        std::fs::create_dir(&base).unwrap();
        let named = Named::new(&base.display().to_string(), Some("main"));
        assert_eq!((named.hub_id.as_deref(), named.shown.as_str()), (None, "my `base`"));
        assert_eq!(named.described(), "`my 'base'`, a local folder");
        assert!(parsed(&front_matter(&named, "adapter", "peft", &["lora"])).get("base_model").is_none());
    }

    #[test]
    fn a_method_tells_what_it_sets() {
        let block = json!({"type": "lora", "r": 8, "lora_dropout": 0.0, "use_dora": true, "bias": "none",
            "rank_pattern": {}, "target_modules": ["q|k"], "modules_to_save": null});
        let block = block.as_object().unwrap();
        assert_eq!(
            method_rows(block),
            [["`r`", "`8`"], ["`use_dora`", "`true`"], ["`target_modules`", "`[\"q¦k\"]`"]]
        );
        assert_eq!(method_tags("lora", block), ["lora", "dora"]);
    }
}
