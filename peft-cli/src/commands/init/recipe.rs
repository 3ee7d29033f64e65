//! The recipe's text.

use crate::render::count;
use crate::yaml;
use peft_core::data::{DatasetConfig, DatasetType};
use peft_methods::{Kind, Scaffold};
use serde_json::Value;

/// Longest example where nothing better is known, in tokens.
const SEQUENCE_LEN: usize = 2048;

/// Fewest records of which some are held out.
const HOLD_OUT_FROM: usize = 40;

/// What is known of a recipe to be.
pub struct Draft<'a> {
    /// The method.
    pub kind: &'static Kind,
    /// What of it.
    pub method: &'a Scaffold,
    /// The base as it was named.
    pub base: &'a str,
    /// Whether the base is so small that it takes large rates.
    pub tiny: bool,
    /// The data.
    pub dataset: &'a DatasetConfig,
    /// Its records, where there is a file.
    pub records: Option<usize>,
    /// Its lengths, where a tokenizer was at hand.
    pub length: Option<Length>,
    /// The name of the recipe, for the output folder.
    pub name: String,
}

/// Lengths in tokens.
pub struct Length {
    /// Of the longest example.
    pub longest: usize,
    /// That the base was made for.
    pub positions: usize,
}

/// The text.
pub fn text(draft: &Draft<'_>) -> String {
    let mut out = format!(
        "# {}: {}. Every key has a default; `peft train --help` lists the flags.\n",
        draft.method.name, draft.method.about
    );
    let mut line = |key: &str, value: &str, comment: &str| {
        // A key that begins a part has a line break before it.
        let (space, key) = key.strip_prefix('\n').map_or(("", key), |key| ("\n", key));
        let entry = format!("{key}: {value}");
        out.push_str(&format!("{space}{entry:<44} # {comment}\n"));
    };
    line("base_model", &scalar(draft.base), "a folder, or a hub id");
    line("\ndatasets", "", "training data: json, jsonl, csv, tsv, parquet or txt");
    for (i, (key, value)) in dataset_keys(draft.dataset).into_iter().enumerate() {
        let dash = if i == 0 { "  - " } else { "    " };
        line(&format!("{dash}{key}"), &value, dataset_comment(&key));
    }
    match draft.records {
        Some(records) if records < HOLD_OUT_FROM => {
            line("val_set_size", "0", "share of the records held out to measure on; too few here");
        }
        _ => {
            line("val_set_size", "0.05", "share of the records held out to measure on");
            line("eval_on_start", "true", "measure the base too, for the comparison at the end");
        }
    }
    sequence(draft, &mut line);

    line("\nmethod", "", draft.method.about);
    let of_type = match (draft.kind.file, draft.kind.in_peft) {
        (None, _) => "all weights; the result is a checkpoint of the base's size",
        (Some(_), true) => "the result is an adapter that PEFT loads too",
        (Some(_), false) => "the result is an adapter",
    };
    line("  type", draft.kind.name, of_type);
    for (key, value, comment) in draft.method.keys {
        line(&format!("  {key}"), value, comment);
    }

    let (usual, of_tiny) = draft.method.learning_rates;
    let rate = if draft.tiny { of_tiny } else { usual };
    let about = if draft.tiny { "peak rate; a tiny model takes a large one" } else { "peak rate" };
    line("\nlearning_rate", rate, about);
    line("lr_scheduler", "cosine", "constant, linear or cosine");
    line("warmup_ratio", "0.03", "share of the steps in which the rate rises");
    line("num_epochs", "1", "passes over the data; or max_steps");
    line("micro_batch_size", "4", "examples at a time: lower it if memory runs out");
    line("gradient_accumulation_steps", "2", "micro-batches a step");
    line(
        "gradient_checkpointing",
        "auto",
        "false (fast), selective or true (little memory): the first that fits",
    );
    line("seed", "42", "the same seed gives the same run");
    line("output_dir", &scalar(&format!("out/{}", draft.name)), "adapter, checkpoints and metrics go here");
    out
}

fn sequence(draft: &Draft<'_>, line: &mut impl FnMut(&str, &str, &str)) {
    let about = "longest example in tokens";
    let Some(Length { longest, positions }) = draft.length else {
        return line("sequence_len", &SEQUENCE_LEN.to_string(), about);
    };
    let fits = longest.next_multiple_of(64).min(positions);
    if draft.dataset.format == DatasetType::Completion {
        // Longer texts become several examples.
        return line(
            "sequence_len",
            &fits.min(SEQUENCE_LEN).to_string(),
            "tokens an example; longer texts are split",
        );
    }
    line("sequence_len", &fits.to_string(), &format!("{about}; here {}", count(longest as u64)));
    if longest > positions {
        line("on_truncation", "drop", "longer than the base was made for: left out and counted");
    }
}

/// Keys of the dataset that are set, with their values as YAML.
fn dataset_keys(dataset: &DatasetConfig) -> Vec<(String, String)> {
    let Ok(Value::Object(map)) = serde_json::to_value(dataset) else { return Vec::new() };
    map.into_iter().filter_map(|(key, value)| Some((key, scalar(value.as_str()?)))).collect()
}

fn dataset_comment(key: &str) -> &'static str {
    match key {
        "path" => "the file, from where peft is started",
        "type" => "alpaca, prompt_completion, messages or completion",
        _ => "the field's name in the file",
    }
}

/// Text as YAML, bare where that reads as the same text.
fn scalar(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    let bare = text.chars().all(plain)
        && !text.starts_with(['-', '.'])
        && serde_saphyr::from_str::<Value>(text).is_ok_and(|value| value == text);
    if bare { text.to_string() } else { yaml::string(text) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::methods::{method, scaffolds};
    use super::*;
    use crate::recipe::read;

    fn draft<'a>(
        (kind, method): (&'static Kind, &'static Scaffold),
        dataset: &'a DatasetConfig,
    ) -> Draft<'a> {
        Draft {
            kind,
            method,
            base: "yes: # no",
            tiny: false,
            dataset,
            records: None,
            length: None,
            name: "1e3".to_string(),
        }
    }

    fn lora() -> (&'static Kind, &'static Scaffold) {
        method("lora").unwrap()
    }

    /// Writes the text and reads it as a recipe.
    fn parsed(draft: &Draft<'_>) -> crate::recipe::Recipe {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.yaml");
        std::fs::write(&path, text(draft)).unwrap();
        read(&path, &[]).unwrap_or_else(|error| panic!("{error}\n{}", text(draft)))
    }

    /// Whether a block has what was written, whatever keys it has besides.
    fn says(block: &Value, written: &Value) -> bool {
        match (block.as_object(), written.as_object()) {
            (Some(block), Some(written)) => {
                written.iter().all(|(key, value)| says(block.get(key).unwrap_or(&Value::Null), value))
            }
            _ => block == written || block.as_f64().is_some_and(|n| written.as_f64() == Some(n)),
        }
    }

    #[test]
    fn every_method_gives_a_recipe_with_a_comment_a_key() {
        let mut dataset = DatasetConfig::new("my data.jsonl", DatasetType::PromptCompletion);
        dataset.field_prompt = Some("null".to_string());
        for (kind, method) in scaffolds() {
            let draft = draft((kind, method), &dataset);
            let recipe = parsed(&draft);
            assert_eq!((recipe.base_model.as_str(), recipe.output_dir.as_str()), ("yes: # no", "out/1e3"));
            assert_eq!(recipe.datasets, [dataset.clone()]);
            let block = serde_json::to_value(&recipe.method).unwrap();
            for (key, value, _) in method.keys {
                let written = serde_saphyr::from_str::<Value>(value).unwrap();
                assert!(says(&block[key], &written), "{key}: {} for {written}", block[key]);
            }
            assert!(
                text(&draft).lines().all(|line| line.is_empty() || line.contains("# ")),
                "{}",
                text(&draft)
            );
        }
    }

    #[test]
    fn lengths_come_from_the_data_up_to_what_the_base_takes() {
        let dataset = DatasetConfig::new("d.jsonl", DatasetType::Alpaca);
        let with = |longest, positions| Draft {
            length: Some(Length { longest, positions }),
            ..draft(lora(), &dataset)
        };
        assert_eq!(parsed(&with(65, 1000)).sequence_len, 128);
        assert_eq!(parsed(&with(65, 1000)).on_truncation, None);
        let cut = parsed(&with(1001, 1000));
        assert_eq!(cut.sequence_len, 1000);
        assert!(cut.on_truncation.is_some());
    }

    #[test]
    fn few_records_are_all_trained_on() {
        let dataset = DatasetConfig::new("d.jsonl", DatasetType::Alpaca);
        let of = |records| parsed(&Draft { records: Some(records), ..draft(lora(), &dataset) }).val_set_size;
        assert_eq!((of(39), of(40)), (0.0, 0.05));
    }
}
