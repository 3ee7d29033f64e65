//! Fifty steps of LoRA against PEFT and PyTorch from the same factors in the same order
//! (`tests/golden/make_lora_trajectory.py`).

use crate::families::{integers, open, relative_difference};
use crate::program::{BASE, metrics};
use peft_core::adapter::{Adapter, SavedAdapter};
use peft_core::checkpoint::SafetensorsFile;
use peft_tests::{golden, peft_ok, root};
use serde_json::Value;

#[test]
fn fifty_steps_equal_pefts() {
    let reference = golden("trajectory");
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run").display().to_string();
    peft_ok(&["train", "tests/golden/trajectory.yaml", "--output-dir", &out]);

    let text = std::fs::read_to_string(reference.join("trajectory.jsonl")).unwrap();
    let expected: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let found = metrics(&dir.path().join("run"));
    assert_eq!((found.len(), expected.len()), (50, 50));
    let mut worst = (0f64, 0f64);
    for (found, expected) in found.iter().zip(&expected) {
        let (loss, norm) = (&found["loss"], &found["grad_norm"]);
        let difference = |f: &Value, e: &Value| (f.as_f64().unwrap() / e.as_f64().unwrap() - 1.0).abs();
        worst.0 = worst.0.max(difference(loss, &expected["loss"]));
        worst.1 = worst.1.max(difference(norm, &expected["grad_norm"]));
        assert_eq!(found["tokens"], expected["tokens"]);
        assert_eq!(found["supervised_tokens"], expected["supervised_tokens"]);
        assert!((found["learning_rate"].as_f64().unwrap() - expected["lr"].as_f64().unwrap()).abs() < 1e-12);
    }
    println!("largest relative difference: loss {:.1e}, gradient norm {:.1e}", worst.0, worst.1);
    assert!(worst.0 < 1e-4 && worst.1 < 1e-3, "{worst:?}");

    // The trained adapter, read back, gives PEFT's logits.
    let expected = SafetensorsFile::open(reference.join("final_logits.safetensors")).unwrap();
    let (ids, _) = integers(&expected, "input_ids");
    let logits = expected.tensor("logits").unwrap().to_f32().unwrap();
    for adapter in [dir.path().join("run/adapter"), reference.join("final")] {
        let mut model = open(&root().join(BASE));
        Adapter::open(&adapter).unwrap().attach(&mut model).unwrap();
        let found: Vec<f32> = model.logits(&ids, 1).try_into_vec_as().unwrap();
        let difference = relative_difference(&found, &logits);
        assert!(difference < 1e-3, "{}: {difference:.1e}", adapter.display());
    }
}
