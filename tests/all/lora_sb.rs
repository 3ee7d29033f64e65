//! LoRA-XS and LoRA-SB against plain PyTorch (`tests/golden/make_core_trajectories.py`), and their files.

use crate::families::{integers, open, relative_difference};
use crate::program::{BASE, losses};
use peft_core::checkpoint::SafetensorsFile;
use peft_core::linalg::Matrix;
use peft_core::model::Decoder;
use peft_core::projection::{Core, Delta};
use peft_methods::open_adapter;
use peft_tests::{golden, peft_ok, root};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

const NAMES: [&str; 2] = ["lora_xs", "lora_sb"];

fn reference(name: &str) -> PathBuf {
    golden("core_trajectories").join(name)
}

fn with_adapter(dir: &Path) -> Decoder {
    let mut model = open(&root().join(BASE));
    open_adapter(dir).unwrap().attach(&mut model).unwrap();
    model
}

fn logits(model: &Decoder, ids: &[i64]) -> Vec<f32> {
    model.logits(ids, 1).try_into_vec_as().unwrap()
}

fn cores(model: &Decoder) -> impl Iterator<Item = (&str, &Core)> {
    model.projections().filter_map(|projection| match &projection.delta {
        Some(Delta::Core(form)) => Some((projection.path.as_str(), form)),
        _ => None,
    })
}

fn matrix(parameter: &peft_core::projection::Parameter) -> Matrix {
    Matrix::from_rows(&parameter.to_host(), parameter.value.dims()).unwrap()
}

fn largest(matrix: &Matrix) -> f32 {
    matrix.to_rows().iter().fold(0f32, |max, value| max.max(value.abs()))
}

/// The largest difference of two matrices, of the largest entry of the second.
fn difference(found: &Matrix, expected: &Matrix) -> f32 {
    largest(&found.clone().minus(1.0, expected).unwrap()) / largest(expected)
}

fn overrides(pairs: &[(&str, Value)]) -> Vec<String> {
    pairs.iter().flat_map(|(key, value)| ["--override".to_string(), format!("{key}={value}")]).collect()
}

fn train(recipe: &str, out: &Path, pairs: &[(&str, Value)]) {
    let (out, overrides) = (out.display().to_string(), overrides(pairs));
    let mut args = vec!["train", recipe, "--output-dir", &out];
    args.extend(overrides.iter().map(String::as_str));
    peft_ok(&args);
}

#[test]
fn thirty_steps_equal_pytorchs() {
    let dir = tempfile::tempdir().unwrap();
    for name in NAMES {
        let out = dir.path().join(name);
        let scale = if name == "lora_xs" { 2.0 } else { 1.0 };
        let method = json!({"type": name, "r": 4, "scale": scale, "target_modules": "all-linear"});
        let start = format!("tests/golden/core_trajectories/{name}");
        train(
            "tests/golden/core_trajectory.yaml",
            &out,
            &[("method", method), ("adapter_name_or_path", json!(start))],
        );
        let text =
            std::fs::read_to_string(golden("core_trajectories").join(format!("{name}.jsonl"))).unwrap();
        let expected: Vec<f64> = text
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64().unwrap())
            .collect();
        let found = losses(&out);
        assert_eq!((found.len(), expected.len()), (30, 30));
        let worst = found.iter().zip(&expected).fold(0f64, |max, (f, e)| max.max((f / e - 1.0).abs()));
        println!("{name}: largest relative difference of a loss {worst:.1e}");
        assert!(worst < 1e-4, "{name}: {worst:.1e}");

        let file =
            SafetensorsFile::open(golden("core_trajectories").join(format!("{name}.safetensors"))).unwrap();
        let (ids, _) = integers(&file, "input_ids");
        let expected = file.tensor("logits").unwrap().to_f32().unwrap();
        let difference = relative_difference(&logits(&with_adapter(&out.join("adapter")), &ids), &expected);
        assert!(difference < 1e-4, "{name}: {difference:.1e}");
    }
}

/// The factors that a run begins with, by a decomposition wide enough to be exact, against those of PyTorch.
#[test]
fn first_values_are_pytorchs() {
    let dir = tempfile::tempdir().unwrap();
    for name in NAMES {
        let out = dir.path().join(name);
        let mut method =
            json!({"type": name, "r": 4, "target_modules": "all-linear", "svd_oversampling": 1000});
        match name {
            "lora_xs" => method["lora_alpha"] = json!(8),
            _ => method["init_num_samples"] = json!(16),
        }
        // A rate of zero in the warm-up's first step leaves the first values as they are.
        train(
            "tests/golden/core_trajectory.yaml",
            &out,
            &[("method", method), ("adapter_name_or_path", Value::Null), ("max_steps", json!(1))],
        );
        let found = with_adapter(&out.join("adapter"));
        let expected = with_adapter(&reference(name));
        let mut modules = 0;
        for ((path, found), (_, expected)) in cores(&found).zip(cores(&expected)) {
            let [a, b, core] = [&found.a, &found.b, &found.core].map(matrix);
            let [a_2, b_2, core_2] = [&expected.a, &expected.b, &expected.core].map(matrix);
            assert!(difference(&a, &a_2) < 1e-4, "{name} {path}: A by {}", difference(&a, &a_2));
            assert!(difference(&b, &b_2) < 1e-4, "{name} {path}: B by {}", difference(&b, &b_2));
            assert_eq!(found.scale, expected.scale);
            if name == "lora_sb" {
                assert!(difference(&core, &core_2) < 1e-4, "{path}: R by {}", difference(&core, &core_2));
            }
            modules += 1;
        }
        assert_eq!(modules, 28);
    }
}
