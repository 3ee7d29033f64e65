//! Where the parts of an adapter lie on a base: its configuration met with the base's modules.

use super::config::{BiasTraining, LoraConfig, TokenIndices};
use super::error::AdapterError;
use super::targets::{select, select_saved};
use crate::model::{BaseShapes, EMBEDDING, HEAD};
use std::collections::{BTreeMap, BTreeSet};

/// What an adapter does to a weight that embedding and head share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SharedWeight {
    /// Nothing, or there is no such weight.
    Untouched,
    /// Both ends change alike.
    Kept,
    /// The ends get weights of their own.
    Parted,
}

/// The modules that an adapter changes, by path.
#[derive(Debug, Clone)]
pub struct Placement {
    /// Linear modules with a low-rank change.
    pub linear: BTreeSet<String>,
    /// Whether the embedding has a low-rank change.
    pub embedding: bool,
    /// Modules trained whole.
    pub saved: Vec<String>,
    /// Rows trained alone, by module.
    pub rows: BTreeMap<String, Vec<u32>>,
    /// Modules whose bias trains in place.
    pub biases: Vec<String>,
    /// What becomes of a shared weight.
    pub shared: SharedWeight,
}

impl LoraConfig {
    /// Finds the configuration's modules on a base. With `strict` (a recipe's configuration, not a file's) every name must
    /// match something, and what happens to a shared weight must have been said.
    ///
    /// # Errors
    /// A name, layer or expression that matches nothing; a shared weight that changes at one end only without a word on
    /// it; rows beyond the vocabulary or in conflict with another change of the same module.
    pub fn place(&self, base: &BaseShapes, strict: bool) -> Result<Placement, AdapterError> {
        let paths: Vec<&str> = base.weights.keys().map(String::as_str).collect();
        let matrices: Vec<&str> = base
            .weights
            .iter()
            .filter(|(_, shape)| shape.len() == 2)
            .map(|(path, _)| path.as_str())
            .collect();
        let targets = select(&self.selection(strict), &matrices)?;
        let mut linear: BTreeSet<String> = targets.into_iter().map(str::to_string).collect();
        let mut saved = select_saved(self.modules_to_save(), &paths)?;

        let is_end = |path: &&String| [EMBEDDING, HEAD].contains(&path.as_str());
        let end = linear.iter().find(is_end).or(saved.iter().find(is_end)).cloned();
        let shared = match (end, base.tied) {
            (None, _) | (_, false) => SharedWeight::Untouched,
            (Some(end), true) => match self.ensure_weight_tying {
                Some(true) => SharedWeight::Kept,
                Some(false) => SharedWeight::Parted,
                None if strict => return Err(AdapterError::SharedWeight { module: end }),
                None => SharedWeight::Parted,
            },
        };
        if shared == SharedWeight::Kept {
            // What changes one end changes both; the embedding stands for them.
            if linear.remove(HEAD) {
                linear.insert(EMBEDDING.to_string());
            }
            for path in &mut saved {
                if path == HEAD {
                    *path = EMBEDDING.to_string();
                }
            }
            saved.sort();
            saved.dedup();
            if self.use_dora && linear.contains(EMBEDDING) {
                let reason = "cannot be adapted with use_dora at both ends of a shared weight";
                return Err(AdapterError::Target {
                    module: EMBEDDING.to_string(),
                    reason: reason.to_string(),
                });
            }
        }
        let embedding = linear.remove(EMBEDDING);

        let rows = self.rows(base, strict)?;
        for path in rows.keys() {
            let adapted = linear.contains(path) || saved.contains(path) || (path == EMBEDDING && embedding);
            if adapted {
                let reason = "has rows in trainable_token_indices and is a target or saved whole too";
                return Err(AdapterError::Target { module: path.clone(), reason: reason.to_string() });
            }
        }
        let biases = base.biases.iter().filter(|path| !saved.contains(path));
        let biases = match self.bias {
            BiasTraining::None => Vec::new(),
            BiasTraining::All => biases.cloned().collect(),
            BiasTraining::LoraOnly => biases.filter(|path| linear.contains(*path)).cloned().collect(),
        };
        if strict && self.bias != BiasTraining::None && biases.is_empty() {
            let reason = "asks for biases to train, but the model has none there; remove the key";
            return Err(AdapterError::Target { module: "bias".to_string(), reason: reason.to_string() });
        }
        Ok(Placement { linear, embedding, saved, rows, biases, shared })
    }

    /// The rows of `trainable_token_indices`, by module.
    fn rows(&self, base: &BaseShapes, strict: bool) -> Result<BTreeMap<String, Vec<u32>>, AdapterError> {
        let wrong =
            |module: &str, reason: String| AdapterError::Target { module: module.to_string(), reason };
        let named: Vec<(&str, &Vec<u32>)> = match &self.trainable_token_indices {
            None => Vec::new(),
            Some(TokenIndices::Embedding(indices)) => vec![(EMBEDDING, indices)],
            Some(TokenIndices::ByModule(map)) => {
                map.iter().map(|(name, rows)| (name.as_str(), rows)).collect()
            }
        };
        let mut rows = BTreeMap::new();
        for (name, indices) in named {
            if indices.is_empty() && !strict {
                continue;
            }
            let path = [EMBEDDING, HEAD]
                .into_iter()
                .find(|path| *path == name || path.ends_with(&format!(".{name}")));
            let Some(path) = path else {
                let reason =
                    format!("is neither {EMBEDDING} nor {HEAD}, whose rows trainable_token_indices can name");
                return Err(wrong(name, reason));
            };
            if path == HEAD && base.tied {
                let reason =
                    "shares its weight with the embedding: name the rows in a plain list, which trains both";
                return Err(wrong(HEAD, format!("{reason} ends")));
            }
            let vocab = base.weights.get(path).and_then(|shape| shape.first()).copied().unwrap_or(0);
            if let Some(token) = indices.iter().find(|token| **token as usize >= vocab) {
                return Err(wrong(
                    path,
                    format!("has no row {token} for trainable_token_indices; it has {vocab}"),
                ));
            }
            let distinct: BTreeSet<&u32> = indices.iter().collect();
            if indices.is_empty() || distinct.len() < indices.len() {
                return Err(wrong(
                    path,
                    "needs trainable_token_indices without repetition, at least one".to_string(),
                ));
            }
            rows.insert(path.to_string(), indices.clone());
        }
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::{Value, json};

    fn base(tied: bool) -> BaseShapes {
        let matrices =
            [EMBEDDING, HEAD, "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"];
        let mut weights: BTreeMap<String, Vec<usize>> =
            matrices.into_iter().map(|path| (path.to_string(), vec![8, 4])).collect();
        weights.insert("model.norm".to_string(), vec![4]);
        let biases = BTreeSet::from(["model.layers.0.self_attn.q_proj".to_string()]);
        BaseShapes { weights, biases, tied }
    }

    fn place(config: Value, tied: bool) -> Result<Placement, AdapterError> {
        serde_json::from_value::<LoraConfig>(config).unwrap().place(&base(tied), true)
    }

    #[test]
    fn a_shared_weight_needs_a_word() {
        let targets = json!({"target_modules": ["q_proj", "lm_head"]});
        let error = place(targets.clone(), true).unwrap_err().to_string();
        assert!(error.contains("`lm_head`") && error.contains("ensure_weight_tying"), "{error}");
        assert_eq!(place(targets, false).unwrap().shared, SharedWeight::Untouched);

        let parted = json!({"target_modules": ["lm_head"], "ensure_weight_tying": false});
        let placement = place(parted, true).unwrap();
        assert!(placement.linear.contains(HEAD) && placement.shared == SharedWeight::Parted);

        let kept = json!({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": true});
        let placement = place(kept, true).unwrap();
        assert_eq!((placement.saved, placement.shared), (vec![EMBEDDING.to_string()], SharedWeight::Kept));
    }

    #[test]
    fn rows_are_checked() {
        let rows = |rows: Value, tied| {
            place(json!({"trainable_token_indices": rows, "target_modules": ["q_proj"]}), tied)
        };
        assert_eq!(rows(json!([3, 1]), true).unwrap().rows[EMBEDDING], [3, 1]);
        assert_eq!(rows(json!({"lm_head": [7]}), false).unwrap().rows[HEAD], [7]);
        for (wrong, tied, says) in [
            (json!([8]), true, "no row 8"),
            (json!([1, 1]), true, "repetition"),
            (json!({"lm_head": [7]}), true, "shares its weight"),
            (json!({"q_proj": [1]}), true, "neither"),
        ] {
            let error = rows(wrong, tied).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        let both = json!({"trainable_token_indices": [1], "target_modules": ["embed_tokens"], "ensure_weight_tying": true});
        assert!(place(both, true).unwrap_err().to_string().contains("target or saved"));
    }

    #[test]
    fn biases_are_those_of_the_model_or_of_the_targets() {
        let biases = |bias: &str, layer: usize| {
            place(json!({"target_modules": ["q_proj"], "bias": bias, "layers_to_transform": layer}), true)
        };
        assert_eq!(biases("all", 1).unwrap().biases.len(), 1);
        assert!(biases("lora_only", 1).is_err());
        assert_eq!(biases("lora_only", 0).unwrap().biases, ["model.layers.0.self_attn.q_proj"]);
    }
}
