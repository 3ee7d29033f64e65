//! When a recipe evaluates and saves, and what it does about the best evaluation.

use super::Recipe;
use peft_core::train::{BestMetric, EarlyStopping, Every, Selection};

impl Recipe {
    /// Checks when to evaluate and save, and what follows from it.
    pub(super) fn check_evaluation(&self) -> Result<(), String> {
        let counts = [
            ("eval_steps", self.eval_steps),
            ("evals_per_epoch", self.evals_per_epoch),
            ("save_steps", self.save_steps),
            ("saves_per_epoch", self.saves_per_epoch),
            ("save_total_limit", self.save_total_limit.map(|limit| limit as u64)),
            ("early_stopping_patience", self.early_stopping_patience),
        ];
        if let Some((key, _)) = counts.iter().find(|(_, count)| *count == Some(0)) {
            return Err(format!("`{key}` is 0, expected a number above 0, or null"));
        }
        for (one, other, both) in [
            ("eval_steps", "evals_per_epoch", self.eval_steps.is_some() && self.evals_per_epoch.is_some()),
            ("save_steps", "saves_per_epoch", self.save_steps.is_some() && self.saves_per_epoch.is_some()),
        ] {
            if both {
                return Err(format!("`{one}` and `{other}` both say how often; keep one"));
            }
        }
        let threshold = self.early_stopping_threshold;
        if !(threshold.is_finite() && threshold >= 0.0) {
            return Err(format!("`early_stopping_threshold` is {threshold}, expected 0 or more"));
        }
        if threshold > 0.0 && self.early_stopping_patience.is_none() {
            return Err(
                "`early_stopping_threshold` does nothing without `early_stopping_patience`".to_string()
            );
        }
        let needs_data = [
            ("load_best_model_at_end", self.load_best_model_at_end),
            ("early_stopping_patience", self.early_stopping_patience.is_some()),
            ("metric_for_best_model", self.metric_for_best_model.is_some()),
            ("eval_steps", self.eval_steps.is_some()),
            ("evals_per_epoch", self.evals_per_epoch.is_some()),
        ];
        let asked = |(key, asked): &(&'static str, bool)| asked.then_some(*key);
        let Some(key) = needs_data.iter().find_map(asked) else {
            return self.check_direction();
        };
        if self.eval_datasets.is_empty() && self.val_set_size == 0.0 {
            return Err(format!("`{key}` needs validation data: set `val_set_size` or `eval_datasets`"));
        }
        if self.eval_steps.is_none() && self.evals_per_epoch.is_none() {
            return Err(format!(
                "`{key}` needs evaluations during the run: set `eval_steps` or `evals_per_epoch`"
            ));
        }
        if self.metric_for_best_model == Some(BestMetric::EvalExactMatch) && self.eval_generations == 0 {
            return Err("`metric_for_best_model` eval_exact_match needs answers to compare: set \
                        `eval_generations` to how many"
                .to_string());
        }
        self.check_direction()
    }

    fn check_direction(&self) -> Result<(), String> {
        let metric = self.metric_for_best_model.unwrap_or_default();
        match self.greater_is_better {
            Some(given) if given != metric.greater_is_better() => Err(format!(
                "`greater_is_better` is {given}, but for {} it is {}; it follows from the metric and can be left out",
                metric.name(),
                !given
            )),
            _ => Ok(()),
        }
    }

    /// When to evaluate.
    pub fn eval_every(&self) -> Option<Every> {
        self.eval_steps.map(Every::Steps).or(self.evals_per_epoch.map(Every::PerEpoch))
    }

    /// When to save.
    pub fn save_every(&self) -> Option<Every> {
        self.save_steps.map(Every::Steps).or(self.saves_per_epoch.map(Every::PerEpoch))
    }

    /// What is done about the best evaluation, where any key asks for something.
    pub fn selection(&self) -> Option<Selection> {
        let patience = self.early_stopping_patience;
        let asked = self.load_best_model_at_end || patience.is_some() || self.metric_for_best_model.is_some();
        let threshold = self.early_stopping_threshold;
        asked.then(|| Selection {
            metric: self.metric_for_best_model.unwrap_or_default(),
            load_best_model_at_end: self.load_best_model_at_end,
            early_stopping: patience.map(|patience| EarlyStopping { patience, threshold }),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use peft_core::strict::parse as parse_strict;
    use serde_json::{Value, json};

    fn check(keys: Value) -> Result<Recipe, String> {
        let mut recipe = json!({"base_model": "b", "datasets": [{"path": "d.jsonl", "type": "alpaca"}]});
        let (Value::Object(all), Value::Object(keys)) = (&mut recipe, keys) else { unreachable!() };
        all.extend(keys);
        let recipe: Recipe = parse_strict(&recipe)?;
        recipe.check().map(|()| recipe)
    }

    #[test]
    fn choosing_the_best_needs_evaluations() {
        let refused = [
            (json!({"load_best_model_at_end": true}), "`load_best_model_at_end` needs validation data"),
            (json!({"early_stopping_patience": 2}), "`early_stopping_patience` needs validation data"),
            (json!({"eval_steps": 5}), "`eval_steps` needs validation data"),
            (json!({"early_stopping_patience": 2, "val_set_size": 8}), "needs evaluations during the run"),
            (json!({"metric_for_best_model": "eval_loss", "val_set_size": 8}), "needs evaluations"),
            (
                json!({"metric_for_best_model": "eval_exact_match", "val_set_size": 8, "eval_steps": 5}),
                "`eval_generations`",
            ),
            (json!({"metric_for_best_model": "eval_f1"}), "eval_token_accuracy"),
            (json!({"early_stopping_threshold": 0.1}), "without `early_stopping_patience`"),
            (json!({"early_stopping_threshold": -0.1}), "`early_stopping_threshold` is -0.1"),
            (json!({"early_stopping_patience": 0}), "`early_stopping_patience` is 0"),
            (json!({"save_total_limit": 0}), "`save_total_limit` is 0"),
            (json!({"save_steps": 1, "saves_per_epoch": 1}), "`save_steps` and `saves_per_epoch`"),
            (
                json!({"eval_steps": 1, "evals_per_epoch": 1, "val_set_size": 8}),
                "`eval_steps` and `evals_per_epoch`",
            ),
            (json!({"greater_is_better": true}), "for eval_loss it is false"),
        ];
        for (keys, expected) in refused {
            let message = check(keys.clone()).unwrap_err();
            println!("{keys}: {message}");
            assert!(message.contains(expected), "{keys}: {message}");
        }
    }

    #[test]
    fn hugging_faces_keys_choose_the_best() {
        let recipe = check(json!({
            "val_set_size": 8, "evals_per_epoch": 4, "load_best_model_at_end": true,
            "metric_for_best_model": "token_accuracy", "greater_is_better": true,
            "early_stopping_patience": 3, "early_stopping_threshold": 0.01,
        }))
        .unwrap();
        let early_stopping = Some(EarlyStopping { patience: 3, threshold: 0.01 });
        let metric = BestMetric::EvalTokenAccuracy;
        let expected = Selection { metric, load_best_model_at_end: true, early_stopping };
        assert_eq!(recipe.selection(), Some(expected));
        assert_eq!((recipe.eval_every(), recipe.save_every()), (Some(Every::PerEpoch(4)), None));
        assert_eq!(check(json!({"val_set_size": 8, "eval_steps": 2})).unwrap().selection(), None);
    }
}
