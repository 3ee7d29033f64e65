//! LoRA-XS and LoRA-SB against plain PyTorch (`tests/golden/make_core_trajectories.py`), and their files.

use crate::families::{integers, open, relative_difference};
use crate::program::{BASE, losses};
use peft_core::checkpoint::{LazyTensor, SafetensorsFile, write_safetensors};
use peft_core::data::{Example, samples};
use peft_core::linalg::{Matrix, Sketch};
use peft_core::model::Decoder;
use peft_core::projection::{Core, Delta};
use peft_core::random::Stream;
use peft_core::train::{GradientCheckpointing, RunLength, StepSettings, TrainError, Warmup};
use peft_methods::lora_sb::{Estimate, estimate, eta};
use peft_methods::{LoraSbBlock, open_adapter};
use peft_tests::{golden, peft, peft_ok, root};
use serde_json::{Value, json};
use std::collections::BTreeMap;
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

fn config(adapter: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(adapter.join("adapter_config.json")).unwrap()).unwrap()
}

/// 60 examples, a rate of 1e-3, 5 warm-up steps of 30, two epochs.
#[test]
fn the_first_steps_rate_is_the_warm_ups_or_the_released_scripts() {
    let length = RunLength { learning_rate: 1e-3, warmup: Warmup::Steps(5), total_steps: 30, epochs: 2.0 };
    let block = |keys: Value| serde_json::from_value::<LoraSbBlock>(keys).unwrap();
    let rate = |keys: Value| eta(&block(keys), length, 60, 3).unwrap();
    assert!((rate(json!({})) - 2e-4).abs() < 1e-18);
    assert_eq!(rate(json!({"eta": 0.5})), 0.5);
    // A sixth of 20 batches in each of two epochs: 6 2/3.
    assert!((rate(json!({"paper_compat": true})) - 1.5e-4).abs() < 1e-18);
    let still = RunLength { warmup: Warmup::Steps(0), ..length };
    assert_eq!(eta(&block(json!({})), still, 60, 3), Ok(1e-3));
    let refused = eta(&block(json!({"paper_compat": true})), still, 60, 3).unwrap_err();
    assert!(refused.contains("warmup_ratio"), "{refused}");
}

#[test]
fn too_few_examples_are_told_and_the_file_says_where_it_came_from() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let method = json!({"type": "lora_sb", "r": 4, "target_modules": ["v_proj"], "init_num_samples": 1000});
    let pairs = [("method", method), ("adapter_name_or_path", Value::Null), ("max_steps", json!(1))];
    let (out_dir, overrides) = (out.display().to_string(), overrides(&pairs));
    let mut args = vec!["train", "tests/golden/core_trajectory.yaml", "--output-dir", &out_dir];
    args.extend(overrides.iter().map(String::as_str));
    let ran = peft(&args);
    let said = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success() && said.contains("there are 60 examples"), "{said}");
    let config = config(&out.join("adapter"));
    assert_eq!(config["peft_type"], "LORA_SB");
    assert_eq!(config["init"]["n_samples"], 60);
    assert_eq!(config["init"]["eta"], json!(1e-3 / 5.0));
    assert_eq!(config["init"]["svd"], json!({"oversampling": 8, "power_iterations": 10}));
}

/// A module behind a weight of zeros gets no gradient, and one behind a value that is not finite gets none that counts.
#[test]
fn gradients_that_say_nothing_are_refused_by_module() {
    let example = |seed: u64| {
        let mut stream = Stream::new(seed, "test", "", &[]);
        let ids = (0..12).map(|_| stream.below(96) as u32).collect();
        Example { ids, supervised: vec![true; 12] }
    };
    let examples: Vec<Example> = (0..4).map(example).collect();
    let step = StepSettings { gradient_checkpointing: GradientCheckpointing::Off, loss_chunk_rows: None };
    let sketch = Sketch { rank: 2, oversampling: 8, power_iterations: 2 };
    let how = Estimate { eta: 1e-3, scale: 1.0, sketch, seed: 1, batch_size: 2 };
    let refused = |value: f32| {
        let mut model = open(&golden("families/llama"));
        let mut projections = model.projections_mut();
        let o_proj = projections.find(|p| p.path == "model.layers.0.self_attn.o_proj").unwrap();
        o_proj.weight.value = o_proj.weight.value.clone().mul_scalar(value);
        drop(projections);
        let paths = ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj"].map(str::to_string);
        estimate(&mut model, &paths, &samples(&examples, 3), how, step).unwrap_err().to_string()
    };
    let zero = refused(0.0);
    assert!(zero.contains("layers.0.self_attn.v_proj") && zero.contains("zero on the 3 samples"), "{zero}");
    let broken = refused(f32::NAN);
    assert!(broken.contains("layers.1.mlp.up_proj") && broken.contains("not finite"), "{broken}");
}

/// The authors' programs save a LoRA's configuration beside `A`, `B` and an `R` whose name PEFT has mangled.
#[test]
fn released_files_are_read() {
    let dir = tempfile::tempdir().unwrap();
    for name in NAMES {
        let released = dir.path().join(name);
        std::fs::create_dir(&released).unwrap();
        let file = SafetensorsFile::open(reference(name).join("adapter_model.safetensors")).unwrap();
        let rename = |key: &str| key.replace(".lora_R.weight", "_lora_latent_mapping.weight");
        let tensors = file.names().map(|key| {
            let tensor = file.tensor(key).unwrap();
            let (dtype, shape, bytes) = (tensor.dtype, tensor.shape.to_vec(), tensor.bytes.to_vec());
            LazyTensor::new(rename(key), dtype, shape, move || Ok(bytes.clone().into()))
        });
        let tensors: Vec<LazyTensor<TrainError>> = tensors.collect();
        write_safetensors(&released.join("adapter_model.safetensors"), tensors, &BTreeMap::new()).unwrap();
        let scale = config(&reference(name))["scale"].as_f64().unwrap();
        let lora = json!({
            "peft_type": "LORA", "r": 4, "lora_alpha": 4.0 * scale, "target_modules": ["q_proj", "k_proj", "v_proj",
            "o_proj", "gate_proj", "up_proj", "down_proj"], "base_model_name_or_path": "base",
        });
        std::fs::write(released.join("adapter_config.json"), lora.to_string()).unwrap();
        let ids: Vec<i64> = (3..20).collect();
        assert_eq!(
            logits(&with_adapter(&released), &ids),
            logits(&with_adapter(&reference(name)), &ids),
            "{name}"
        );

        let beyond = lora.to_string().replace("\"r\":4", "\"r\":4,\"use_dora\":true");
        std::fs::write(released.join("adapter_config.json"), beyond).unwrap();
        let error = open_adapter(&released).err().unwrap().to_string();
        assert!(error.contains("use_dora"), "{error}");
    }
}
