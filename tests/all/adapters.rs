//! Adapters written by PEFT on the families' checkpoints (`tests/golden/make_adapters.py`): the same logits, the same
//! configuration and the same tensors when written again, and the same logits once folded.

use crate::families::{integers, open, relative_difference};
use peft_core::adapter::{Adapter, AdapterConfig, RewriteOptions, SavedAdapter, fold, save};
use peft_core::checkpoint::{Checkpoint, SafetensorsFile};
use peft_tests::golden;
use std::path::PathBuf;

/// Adapter folders with the base each belongs to.
pub fn adapters() -> Vec<(String, PathBuf, PathBuf)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(golden("adapters")).unwrap() {
        let dir = entry.unwrap().path();
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.join("adapter_config.json")).unwrap()).unwrap();
        let base = config["base_model_name_or_path"].as_str().unwrap();
        let base = golden("families").join(base.rsplit('/').next().unwrap());
        found.push((name, dir, base));
    }
    found.sort();
    assert!(found.len() >= 29, "golden adapters are missing");
    found
}

#[test]
fn logits_equal_pefts_attached_and_folded() {
    let out = tempfile::tempdir().unwrap();
    for (name, dir, base) in adapters() {
        let expected = SafetensorsFile::open(dir.join("expected.safetensors")).unwrap();
        let (ids, shape) = integers(&expected, "input_ids");
        let logits = expected.tensor("logits").unwrap().to_f32().unwrap();
        let adapter = Adapter::open(&dir).unwrap();

        let mut model = open(&base);
        let plain: Vec<f32> = model.logits(&ids, shape[0]).try_into_vec_as().unwrap();
        assert!(relative_difference(&plain, &logits) > 1e-2, "{name}: the adapter should matter");
        adapter.attach(&mut model).unwrap();
        let attached: Vec<f32> = model.logits(&ids, shape[0]).try_into_vec_as().unwrap();
        let difference = relative_difference(&attached, &logits);
        assert!(difference < 1e-5, "{name} attached: {difference:.1e}");

        let output = out.path().join(&name);
        let options = RewriteOptions { dtype: None, max_shard_size: RewriteOptions::DEFAULT_SHARD };
        fold(&Checkpoint::open(&base).unwrap(), &adapter, &output, &options).unwrap();
        let folded: Vec<f32> = open(&output).logits(&ids, shape[0]).try_into_vec_as().unwrap();
        let difference = relative_difference(&folded, &logits);
        assert!(difference < 1e-5, "{name} folded: {difference:.1e}");
    }
}

#[test]
fn written_again_the_files_are_pefts() {
    let out = tempfile::tempdir().unwrap();
    for (name, dir, base) in adapters() {
        let adapter = Adapter::open(&dir).unwrap();
        let mut model = open(&base);
        adapter.attach(&mut model).unwrap();
        let placement = adapter.config.lora.place(&open(&base).base_shapes(), false).unwrap();
        let whole: Vec<String> = placement.saved.iter().map(|path| format!("{path}.weight")).collect();
        let biases: Vec<String> = placement.biases.iter().map(|path| format!("{path}.bias")).collect();
        let trained = [whole, biases].concat();
        for parameter in model.parameters_mut().into_iter().filter(|p| trained.contains(&p.name)) {
            parameter.set_trainable();
        }
        save(&model, &adapter.config, out.path()).unwrap();

        let bytes = |file: PathBuf| std::fs::read(file).unwrap();
        let written = bytes(out.path().join("adapter_model.safetensors"));
        assert_eq!(written, bytes(dir.join("adapter_model.safetensors")), "{name}: weights");
        let written = sorted(&bytes(out.path().join("adapter_config.json")));
        assert_eq!(written, sorted(&bytes(dir.join("adapter_config.json"))), "{name}: configuration");
    }
}

/// A configuration with the lists of names, which PEFT writes in no particular order, sorted.
pub fn sorted(bytes: &[u8]) -> String {
    let mut json: serde_json::Value = serde_json::from_slice(bytes).unwrap();
    for key in ["target_modules", "exclude_modules", "feedforward_modules"] {
        if let Some(list) = json.get_mut(key).and_then(|list| list.as_array_mut()) {
            list.sort_by_key(|name| name.to_string());
        }
    }
    format!("{json:#}")
}

#[test]
fn a_key_that_changes_the_forward_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let config = r#"{"peft_type": "LORA", "target_modules": ["q_proj"], "use_qalora": true}"#;
    std::fs::write(dir.path().join("adapter_config.json"), config).unwrap();
    let error = AdapterConfig::read(dir.path()).unwrap_err();
    assert!(error.is_bad_input());
    assert!(error.to_string().contains("`use_qalora`"), "{error}");
}
