//! Logits and greedy generations of every family against transformers (`tests/golden/make_families.py`).

use burn::tensor::Device;
use peft_core::checkpoint::{Checkpoint, SafetensorsFile};
use peft_core::model::{ComputeType, Decoder, ModelConfig, Sampling, generate, load};
use peft_tests::golden;
use std::path::{Path, PathBuf};

pub fn open(dir: &Path) -> Decoder {
    load(&Checkpoint::open(dir).unwrap(), &Device::flex(), ComputeType::F32).unwrap()
}

pub fn integers(file: &SafetensorsFile, name: &str) -> (Vec<i64>, Vec<usize>) {
    let tensor = file.tensor(name).unwrap();
    let values = tensor.bytes.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect();
    (values, tensor.shape.to_vec())
}

/// The largest difference relative to the largest expected value.
pub fn relative_difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let scale = expected.iter().fold(0f32, |max, v| max.max(v.abs()));
    found.iter().zip(expected).fold(0f32, |max, (f, e)| max.max((f - e).abs())) / scale
}

pub fn families() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        std::fs::read_dir(golden("families")).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.sort();
    assert!(found.len() >= 18, "golden families are missing: {found:?}");
    found
}

#[test]
fn logits_and_greedy_generations_equal_transformers() {
    let mut failures = Vec::new();
    for dir in families() {
        let expected = SafetensorsFile::open(dir.join("expected.safetensors")).unwrap();
        let model = open(&dir);
        let (ids, shape) = integers(&expected, "input_ids");
        let logits: Vec<f32> = model.logits(&ids, shape[0]).try_into_vec_as().unwrap();
        let difference = relative_difference(&logits, &expected.tensor("logits").unwrap().to_f32().unwrap());
        let (greedy, _) = integers(&expected, "greedy");
        let greedy: Vec<u32> = greedy.into_iter().map(|id| id as u32).collect();
        let (prompt, continuation) = greedy.split_at(6);
        let generated = generate(&model, prompt, continuation.len(), &[], &Sampling::greedy(), |_| true);
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        println!("{name:<24} {difference:.1e}");
        if difference > 1e-4 || generated != continuation {
            failures.push(format!("{name}: {difference:.1e}, {generated:?} for {continuation:?}"));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn configurations_of_transformers_4_mean_the_same() {
    let mut seen = 0;
    for dir in families() {
        let path = dir.join("config_v4.json");
        if !path.is_file() {
            continue;
        }
        seen += 1;
        let parse = |path: &Path| {
            let json = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
            format!("{:?}", ModelConfig::from_json(&dir, &json).unwrap())
        };
        assert_eq!(parse(&path), parse(&dir.join("config.json")), "{}", dir.display());
    }
    assert!(seen >= 4, "{seen}");
}
