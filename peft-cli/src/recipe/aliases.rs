//! Names that other trainers use for the same keys.

use serde_json::{Map, Value};

const TOP: [(&str, &str); 23] = [
    ("model", "base_model"),
    ("model_name_or_path", "base_model"),
    ("base_model_name_or_path", "base_model"),
    ("revision_of_model", "revision"),
    ("model_revision", "revision"),
    ("max_seq_length", "sequence_len"),
    ("cutoff_len", "sequence_len"),
    ("max_length", "sequence_len"),
    ("packing", "sample_packing"),
    ("per_device_train_batch_size", "micro_batch_size"),
    ("num_train_epochs", "num_epochs"),
    ("lr_scheduler_type", "lr_scheduler"),
    ("val_size", "val_set_size"),
    ("test_datasets", "eval_datasets"),
    ("eval_dataset", "eval_datasets"),
    ("per_device_eval_batch_size", "eval_batch_size"),
    ("optim", "optimizer"),
    ("early_stopping_steps", "early_stopping_patience"),
    ("steps_per_eval", "eval_steps"),
    ("save_every", "save_steps"),
    ("save_every_n_steps", "save_steps"),
    ("log_every_n_steps", "logging_steps"),
    ("steps_per_report", "logging_steps"),
];

const METHOD: [(&str, &str); 7] = [
    ("lora_r", "r"),
    ("lora_rank", "r"),
    ("rank", "r"),
    ("alpha", "lora_alpha"),
    ("dropout", "lora_dropout"),
    ("lora_target_modules", "target_modules"),
    ("lora_modules_to_save", "modules_to_save"),
];

/// Renames known synonyms. A plain name for `method` or `optimizer` becomes a block with that `type`.
///
/// # Errors
/// A key given under two names.
pub fn rename(recipe: &mut Value) -> Result<(), String> {
    let Value::Object(map) = recipe else { return Ok(()) };
    rename_keys(map, &TOP)?;
    for key in ["method", "optimizer"] {
        if let Some(Value::String(name)) = map.get(key) {
            // The same update in other implementations.
            let same = ["adamw_torch", "adamw_torch_fused", "adamw_hf"].contains(&name.as_str());
            let name = if same { "adamw" } else { name };
            let block = serde_json::json!({ "type": name });
            map.insert(key.to_string(), block);
        }
    }
    if let Some(Value::Object(method)) = map.get_mut("method") {
        rename_keys(method, &METHOD)?;
    }
    Ok(())
}

fn rename_keys(map: &mut Map<String, Value>, aliases: &[(&str, &str)]) -> Result<(), String> {
    for (alias, canonical) in aliases {
        let Some(value) = map.remove(*alias) else { continue };
        if map.insert(canonical.to_string(), value).is_some() {
            return Err(format!("`{alias}` and `{canonical}` are two names of one key; keep one"));
        }
    }
    Ok(())
}
