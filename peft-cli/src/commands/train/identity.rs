//! What makes a run the same run: which keys a saved state must agree with.

use crate::recipe::{Checkpointing, Recipe};
use peft_core::data::{DataFile, Example, examples_sha256};
use peft_core::train::{Fingerprint, Identity, Schedule, Warmup};
use serde_json::{Value, json};

/// Keys of a recipe that may change between a run and its continuation. Those of the first group name things whose
/// contents or effects are compared instead; the others only say what is written, evaluated or kept. Every other key
/// decides the course of the run, be it in its last bits as `gradient_checkpointing` does.
const FREE: [&str; 25] = [
    "base_model",
    "revision",
    "adapter_name_or_path",
    "path",
    "device",
    "dtype",
    "num_epochs",
    "max_steps",
    "warmup_ratio",
    "warmup_steps",
    "output_dir",
    "eval_steps",
    "evals_per_epoch",
    "eval_on_start",
    "eval_batch_size",
    "eval_generations",
    "save_steps",
    "saves_per_epoch",
    "save_total_limit",
    "load_best_model_at_end",
    "greater_is_better",
    "early_stopping_patience",
    "early_stopping_threshold",
    "logging_steps",
    "report_to",
];

/// What a run works on.
pub struct Inputs<'a> {
    /// Hash of the base's weights and configuration.
    pub base_sha256: &'a str,
    /// Training files.
    pub files: &'a [DataFile],
    /// Validation files of their own.
    pub eval_files: &'a [DataFile],
    /// Training examples.
    pub train: &'a [Example],
    /// Validation examples.
    pub validation: &'a [Example],
    /// The device's kind.
    pub device: &'a str,
    /// Type of weights and activations.
    pub dtype: &'a str,
    /// Steps of the whole run.
    pub total_steps: u64,
}

/// The run's identity.
///
/// The learning rates of a schedule that falls depend on the number of steps, so only a constant one can be made longer
/// or shorter.
pub fn identity(recipe: &Recipe, warmup: Warmup, inputs: &Inputs) -> Identity {
    let mut run = Fingerprint::new();
    flatten(String::new(), &json!(recipe), &mut run);
    let mut add = |key: &str, value: String| run.insert(key.to_string(), value);
    add("base", inputs.base_sha256.to_string());
    add("dtype", inputs.dtype.to_string());
    add("tokenised training data", examples_sha256(inputs.train));
    if !inputs.validation.is_empty() {
        add("tokenised validation data", examples_sha256(inputs.validation));
    }
    for (name, files) in [("datasets", inputs.files), ("eval_datasets", inputs.eval_files)] {
        for (index, file) in files.iter().enumerate() {
            add(&format!("{name}.{index}.file"), file.sha256.clone());
        }
    }
    add("warmup_steps", warmup.steps(inputs.total_steps).to_string());
    if let Some(schedule) =
        json!(recipe.lr_scheduler).as_str().filter(|_| recipe.lr_scheduler != Schedule::Constant)
    {
        let key = format!("the number of steps, on which the rates of lr_scheduler {schedule} depend,");
        add(&key, inputs.total_steps.to_string());
    }
    let environment = [("device", inputs.device), ("version of peft", env!("CARGO_PKG_VERSION"))];
    let environment = environment.map(|(key, value)| (key.to_string(), value.to_string())).into();
    Identity { run, environment }
}

/// What the backward of a saved run computes again: another choice would change its last bits.
pub fn checkpointing(saved: &Identity) -> Checkpointing {
    let value = saved.run.get("gradient_checkpointing").map(|text| match text.parse::<bool>() {
        Ok(whole) => Value::Bool(whole),
        Err(_) => Value::String(text.clone()),
    });
    value.and_then(|value| value.try_into().ok()).unwrap_or_default()
}

/// Adds every value in `value` that is set under its dotted key, unless a part of the key is free.
fn flatten(key: String, value: &Value, into: &mut Fingerprint) {
    let within = |part: &str| if key.is_empty() { part.to_string() } else { format!("{key}.{part}") };
    match value {
        Value::Null => {}
        Value::Object(map) => {
            for (part, value) in map.iter().filter(|(part, _)| !FREE.contains(&part.as_str())) {
                flatten(within(part), value, into);
            }
        }
        // Lists of blocks go on by place; lists of names are values.
        Value::Array(items) if items.iter().any(Value::is_object) => {
            for (index, value) in items.iter().enumerate() {
                flatten(within(&index.to_string()), value, into);
            }
        }
        Value::String(text) => {
            into.insert(key, text.clone());
        }
        other => {
            into.insert(key, other.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity_of(change: impl FnOnce(&mut Recipe, &mut Inputs)) -> Identity {
        let example = |id| Example { ids: vec![1, id], supervised: vec![false, true] };
        let file = |name: &str| DataFile { path: name.into(), sha256: name.to_string(), records: 1 };
        let (train, validation) = ([example(2)], [example(3)]);
        let (files, eval_files) = ([file("t")], [file("v")]);
        let mut inputs = Inputs {
            base_sha256: "b",
            files: &files,
            eval_files: &eval_files,
            train: &train,
            validation: &validation,
            device: "cpu",
            dtype: "F32",
            total_steps: 10,
        };
        let mut recipe = Recipe { lr_scheduler: Schedule::Constant, ..Recipe::default() };
        change(&mut recipe, &mut inputs);
        let warmup = recipe.warmup_steps.map_or(Warmup::Ratio(recipe.warmup_ratio), Warmup::Steps);
        identity(&recipe, warmup, &inputs)
    }

    /// The keys in which a changed run differs from the plain one.
    fn changed(change: impl FnOnce(&mut Recipe, &mut Inputs)) -> Vec<String> {
        let (plain, other) = (identity_of(|_, _| {}).run, identity_of(change).run);
        let differs = |key: &&String| plain.get(*key) != other.get(*key);
        let mut keys: Vec<String> = plain.keys().chain(other.keys()).filter(differs).cloned().collect();
        keys.dedup();
        keys
    }

    #[test]
    fn what_decides_the_course_is_compared() {
        assert_eq!(changed(|recipe, _| recipe.max_grad_norm = None), ["max_grad_norm"]);
        assert_eq!(changed(|recipe, _| recipe.optimizer.eps = 1e-6), ["optimizer.eps"]);
        assert_eq!(changed(|recipe, _| recipe.learning_rate = 1e-6), ["learning_rate"]);
        assert_eq!(
            changed(|recipe, _| recipe.gradient_accumulation_steps = 2),
            ["gradient_accumulation_steps"]
        );
        assert_eq!(changed(|recipe, _| recipe.loss_chunk_rows = Some(2)), ["loss_chunk_rows"]);
        assert_eq!(changed(|recipe, _| recipe.warmup_steps = Some(2)), ["warmup_steps"]);
        assert_eq!(
            changed(|recipe, _| recipe.method = serde_json::from_value(json!({"r": 9})).unwrap_or_default()),
            ["method.r"]
        );
        assert_eq!(changed(|_, inputs| inputs.base_sha256 = "c"), ["base"]);
        assert_eq!(changed(|_, inputs| inputs.dtype = "BF16"), ["dtype"]);
        assert_eq!(changed(|_, inputs| inputs.train = &[]), ["tokenised training data"]);
        assert_eq!(changed(|_, inputs| inputs.validation = &[]), ["tokenised validation data"]);
        assert_eq!(changed(|_, inputs| inputs.eval_files = &[]), ["eval_datasets.0.file"]);
    }

    #[test]
    fn a_saved_run_says_what_it_computes_again() {
        use peft_core::train::GradientCheckpointing::{Layers, Off, Selective};
        for mode in [Off, Selective, Layers].map(Checkpointing::Mode) {
            let saved = identity_of(|recipe, _| recipe.gradient_checkpointing = mode);
            assert_eq!(checkpointing(&saved), mode);
        }
        assert_eq!(checkpointing(&Identity::default()), Checkpointing::Auto);
    }

    #[test]
    fn what_does_not_decide_it_may_change() {
        let none: [&str; 0] = [];
        assert_eq!(changed(|recipe, _| recipe.base_model = "elsewhere".to_string()), none);
        assert_eq!(changed(|recipe, _| recipe.save_steps = Some(3)), none);
        assert_eq!(changed(|recipe, _| recipe.early_stopping_patience = Some(3)), none);
        assert_eq!(changed(|recipe, _| recipe.output_dir = "elsewhere".to_string()), none);
        assert_eq!(changed(|_, inputs| inputs.device = "cuda"), none);
    }

    #[test]
    fn only_a_constant_schedule_can_be_lengthened() {
        assert_eq!(changed(|_, inputs| inputs.total_steps = 20), [""; 0]);
        let linear = |steps| {
            identity_of(|recipe, inputs| {
                (recipe.lr_scheduler, inputs.total_steps) = (Schedule::Linear, steps);
            })
        };
        assert_ne!(linear(10).run, linear(20).run);
        assert!(linear(10).run.keys().any(|key| key.contains("lr_scheduler linear depend")));
        // A warm-up that is a share of the steps changes with them.
        let share = |steps| {
            identity_of(|recipe, inputs| (recipe.warmup_ratio, inputs.total_steps) = (0.1, steps)).run
        };
        assert_eq!(
            (share(10).get("warmup_steps"), share(20).get("warmup_steps")),
            (Some(&"1".to_string()), Some(&"2".to_string()))
        );
    }
}
