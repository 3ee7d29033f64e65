//! The `compare` block of a recipe, and the runs that it asks for.

use crate::error::CliError;
use crate::recipe::{self, Recipe};
use peft_core::strict;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// Characters of the longest label, which is a part of folders' names.
const MAX_LABEL: usize = 64;

/// The recipe's part that is the comparison's own.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct File {
    compare: Block,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct Block {
    /// The methods, in the order of the table.
    methods: Vec<Entry>,
    /// Each method is run with each of them; by default with the recipe's `seed`.
    seeds: Option<Vec<u64>>,
    /// The rates that a method is tried with unless it has its own; by default the recipe's `learning_rate`.
    learning_rates: Option<Vec<f64>>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct Entry {
    /// What the table calls it; by default the method's type.
    label: Option<String>,
    /// The method block of a recipe.
    method: Value,
    /// Rates of its own.
    learning_rates: Option<Vec<f64>>,
}

/// A run that a comparison needs.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The method's label.
    pub label: String,
    /// Peak rate.
    pub rate: f64,
    /// `LABEL-rate-seed`, the name of its folder.
    pub name: String,
    /// Its recipe as `peft train` resolves it.
    pub recipe: Recipe,
    /// Its recipe as it is written for `peft train`.
    pub keys: Value,
}

impl Wanted {
    /// Where its results go.
    pub fn dir(&self) -> PathBuf {
        PathBuf::from(&self.recipe.output_dir)
    }

    /// A file beside that folder, of the same name.
    pub fn beside(&self, extension: &str) -> PathBuf {
        // A rate like 1.5e-4 has a dot, so the extension is appended, not exchanged.
        PathBuf::from(format!("{}.{extension}", self.recipe.output_dir))
    }
}

/// A comparison.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Where everything goes.
    pub output_dir: PathBuf,
    /// The methods' labels, in the order of the table.
    pub labels: Vec<String>,
    /// Seeds of every method.
    pub seeds: Vec<u64>,
    /// Every run: by method, then rate, then seed.
    pub runs: Vec<Wanted>,
}

impl Plan {
    /// Reads the recipe at `path`.
    ///
    /// # Errors
    /// Anything wrong with the file, naming key and nearest known key.
    pub fn read(path: &Path, overrides: &[String]) -> Result<Self, CliError> {
        let value = recipe::value(path, overrides)?;
        Self::of(value).map_err(|message| CliError::Recipe { path: path.to_path_buf(), message })
    }

    fn of(mut value: Value) -> Result<Self, String> {
        let Some(keys) = value.as_object_mut() else { return Err("expected keys and values".to_string()) };
        let Some(block) = keys.remove("compare") else {
            let message =
                "`compare` is missing: {methods: [{method: {type: …}}, …], seeds: […], learning_rates: […]}";
            return Err(message.to_string());
        };
        let File { compare } = strict::parse(&json!({"compare": block}))?;
        if keys.contains_key("method") {
            return Err("`method` stands beside `compare.methods`; move it there".to_string());
        }
        if compare.methods.is_empty() {
            return Err("`compare.methods` is empty: a list of {method: {type: …}}".to_string());
        }
        let defaults = Recipe::default();
        let seeds = list(keys, "compare.seeds", "seed", compare.seeds, defaults.seed)?;
        let rates = compare.learning_rates;
        let rates = list(keys, "compare.learning_rates", "learning_rate", rates, defaults.learning_rate)?;
        require_positive("compare.learning_rates", &rates)?;

        // What all runs have in common is looked at first, so that its mistakes are no method's.
        keys.remove("seed");
        keys.remove("learning_rate");
        let common = recipe::resolve(Value::Object(keys.clone()))?;
        if common.eval_datasets.is_empty() && common.val_set_size == 0.0 {
            let message = "methods are compared on validation data: set `val_set_size` or `eval_datasets`";
            return Err(message.to_string());
        }
        let output_dir = PathBuf::from(&common.output_dir);
        let mut plan = Self { output_dir, labels: Vec::new(), seeds, runs: Vec::new() };
        for (index, entry) in compare.methods.into_iter().enumerate() {
            plan.add(keys, entry, &rates, &format!("compare.methods[{index}]"))?;
        }
        Ok(plan)
    }

    /// Adds the runs of the method at `place` in the recipe.
    fn add(
        &mut self,
        common: &Map<String, Value>,
        entry: Entry,
        rates: &[f64],
        place: &str,
    ) -> Result<(), String> {
        if entry.method.is_null() {
            return Err(format!("`{place}.method` is missing: {{type: …}}, as in a recipe for `peft train`"));
        }
        let rates = match entry.learning_rates {
            Some(own) => {
                let key = format!("{place}.learning_rates");
                require_positive(&key, &own)?;
                distinct(&key, own)?
            }
            None => rates.to_vec(),
        };
        let mut common = common.clone();
        common.insert("method".to_string(), entry.method);
        let within = |message: String| format!("`{place}`: {message}");
        let recipe = recipe::resolve(Value::Object(common.clone())).map_err(within)?;
        let checked = recipe.method.block.check(recipe.adapter_name_or_path.is_some());
        checked.map_err(|message| within(format!("`method`: {message}")))?;
        let label = entry.label.unwrap_or_else(|| recipe.method.kind.name.to_string());
        self.check_label(&label, place)?;
        for rate in rates {
            for seed in &self.seeds {
                let name = format!("{label}-{rate:e}-{seed}");
                let output_dir = self.output_dir.join("runs").join(&name).display().to_string();
                let mut keys = common.clone();
                keys.insert("learning_rate".to_string(), rate.into());
                keys.insert("seed".to_string(), (*seed).into());
                keys.insert("output_dir".to_string(), output_dir.into());
                let keys = Value::Object(keys);
                let recipe = recipe::resolve(keys.clone()).map_err(within)?;
                self.runs.push(Wanted { label: label.clone(), rate, name, recipe, keys });
            }
        }
        self.labels.push(label);
        Ok(())
    }

    /// A label names folders and rows, so it must be fit for both and be there once.
    fn check_label(&self, label: &str, place: &str) -> Result<(), String> {
        let fit = |c: char| c.is_ascii_alphanumeric() || "-_.+".contains(c);
        if label.is_empty() || label.len() > MAX_LABEL || label.starts_with('.') || !label.chars().all(fit) {
            return Err(format!(
                "`{place}.label` is {label:?}, expected up to {MAX_LABEL} letters, digits, `-`, `_`, `+` or `.`, not first a `.`: it names folders"
            ));
        }
        // Where letter case does not tell folders apart, runs would meet in one.
        if self.labels.iter().any(|other| other.eq_ignore_ascii_case(label)) {
            return Err(format!(
                "`{place}` is the second that is called `{label}`; give it a `label` of its own"
            ));
        }
        Ok(())
    }
}

/// The values at `key`, or the single one at `single` of the recipe, or its default. Not both.
fn list<T>(
    keys: &Map<String, Value>,
    key: &str,
    single: &str,
    values: Option<Vec<T>>,
    default: T,
) -> Result<Vec<T>, String>
where
    T: for<'de> Deserialize<'de> + PartialEq + std::fmt::Display,
{
    match (values, keys.get(single)) {
        (Some(_), Some(_)) => Err(format!("`{key}` and `{single}` both say which; keep one")),
        (Some(values), None) => distinct(key, values),
        (None, Some(value)) => {
            let value = T::deserialize(value).map_err(|error| format!("`{single}`: {error}"))?;
            Ok(vec![value])
        }
        (None, None) => Ok(vec![default]),
    }
}

fn require_positive(key: &str, rates: &[f64]) -> Result<(), String> {
    match rates.iter().find(|rate| !(rate.is_finite() && **rate > 0.0)) {
        Some(rate) => Err(format!("`{key}` has {rate}, expected numbers above 0")),
        None => Ok(()),
    }
}

/// At least one, and each once.
fn distinct<T: PartialEq + std::fmt::Display>(key: &str, values: Vec<T>) -> Result<Vec<T>, String> {
    if values.is_empty() {
        return Err(format!("`{key}` is empty, expected at least one number"));
    }
    match values.iter().enumerate().find(|(index, value)| values[..*index].contains(value)) {
        Some((_, twice)) => Err(format!("`{key}` has {twice} twice")),
        None => Ok(values),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn plan(compare: Value, keys: Value) -> Result<Plan, String> {
        let mut recipe = json!({
            "base_model": "b", "datasets": [{"path": "d.jsonl", "type": "alpaca"}], "val_set_size": 8,
            "output_dir": "o", "compare": compare,
        });
        let (Value::Object(all), Value::Object(keys)) = (&mut recipe, keys) else { unreachable!() };
        all.extend(keys);
        Plan::of(recipe)
    }

    #[test]
    fn every_method_rate_and_seed_is_a_run() {
        let compare = json!({
            "methods": [
                {"method": {"type": "lora", "lora_r": 4}},
                {"method": "vera", "label": "VeRA+", "learning_rates": [1.5e-2]},
            ],
            "seeds": [1, 2],
            "learning_rates": [1e-3, 5e-3],
        });
        let plan = plan(compare, json!({})).unwrap();
        let names: Vec<&str> = plan.runs.iter().map(|run| run.name.as_str()).collect();
        assert_eq!(
            names,
            ["lora-1e-3-1", "lora-1e-3-2", "lora-5e-3-1", "lora-5e-3-2", "VeRA+-1.5e-2-1", "VeRA+-1.5e-2-2"]
        );
        assert_eq!(plan.labels, ["lora", "VeRA+"]);
        let last = &plan.runs[5];
        assert_eq!(
            (last.recipe.seed, last.recipe.learning_rate, last.recipe.method.kind.name),
            (2, 1.5e-2, "vera")
        );
        assert_eq!(last.dir(), Path::new("o/runs/VeRA+-1.5e-2-2"));
        assert_eq!(last.beside("log"), Path::new("o/runs/VeRA+-1.5e-2-2.log"));
        // What is written for `peft train` is the same recipe.
        let written = recipe::resolve(last.keys.clone()).unwrap();
        assert_eq!(json!(written), json!(last.recipe));
        // Without lists, the recipe's own rate and seed, or their defaults.
        let one = super::tests::plan(json!({"methods": [{"method": "lora"}]}), json!({"seed": 7})).unwrap();
        assert_eq!(one.runs.iter().map(|run| run.name.as_str()).collect::<Vec<_>>(), ["lora-2e-4-7"]);
    }

    #[test]
    fn mistakes_name_their_key() {
        let lora = json!([{"method": "lora"}]);
        let refused = [
            (json!({"metods": []}), json!({}), "`compare.metods` (did you mean `methods`?)"),
            (json!({"methods": []}), json!({}), "`compare.methods` is empty"),
            (json!({"methods": [{"label": "a"}]}), json!({}), "`compare.methods[0].method` is missing"),
            (json!({"methods": [{"method": "lora", "lable": "a"}]}), json!({}), "did you mean `label`?"),
            (json!({"methods": [{"method": {"type": "lroa"}}]}), json!({}), "did you mean `lora`?"),
            (json!({"methods": [{"method": {"type": "vera", "d_inital": 1}}]}), json!({}), "`d_initial`"),
            (json!({"methods": [{"method": {"type": "lora", "r": 0}}]}), json!({}), "`compare.methods[0]`"),
            (
                json!({"methods": [{"method": "lora"}, {"method": "lora"}]}),
                json!({}),
                "second that is called `lora`",
            ),
            (
                json!({"methods": [{"method": "lora", "label": "../x"}]}),
                json!({}),
                "`compare.methods[0].label`",
            ),
            (json!({"methods": lora, "seeds": [1, 1]}), json!({}), "`compare.seeds` has 1 twice"),
            (json!({"methods": lora, "seeds": []}), json!({}), "`compare.seeds` is empty"),
            (json!({"methods": lora, "seeds": [-1]}), json!({}), "compare.seeds[0]"),
            (json!({"methods": lora, "learning_rates": [0.0]}), json!({}), "`compare.learning_rates` has 0"),
            (json!({"methods": lora, "learning_rates": [1e-3]}), json!({"learning_rate": 1e-3}), "keep one"),
            (json!({"methods": lora}), json!({"method": {"type": "lora"}}), "move it there"),
            (json!({"methods": lora}), json!({"val_set_size": 0}), "`val_set_size`"),
            (json!({"methods": lora}), json!({"max_step": 3}), "did you mean `max_steps`?"),
        ];
        for (compare, keys, expected) in refused {
            let message = plan(compare.clone(), keys).unwrap_err();
            println!("{compare}: {message}");
            assert!(message.contains(expected), "{compare}: {message}");
        }
    }
}
